"""Two digests of an evaluated task, so that scores on different questions are not compared.

    task       its definition: templates, metrics, filters, shots, and the code that it names
    questions  every text that the model was given, in order, with the record it was made from

Neither depends on where files are. Cost: one pass over the questions, which are in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Where the data are, what a machine adds, and the name, which the scores have already.
_LEFT_OUT = (
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "custom_dataset",
    "metadata",
    "task",
)
SPLITS = "megatron_dwm_splits"
"""of a task's metadata: its own names of splits, where its data lacks one that is not read"""
_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class TaskDigests:
    """Hexadecimal digests of one task; None in scores of older versions, which had none."""

    task: str | None = None
    questions: str | None = None


def digests_of(definition: Mapping[str, Any], requests: Iterable[Any]) -> TaskDigests:
    """Returns the digests of a task that has been evaluated.

    requests: the harness's requests, each with `args` (texts for the model) and `doc` (a record).
    """
    kept = {key: value for key, value in definition.items() if key not in _LEFT_OUT}
    about = definition.get("metadata") or {}
    version, kept = about.get("version"), {**kept, **about.get(SPLITS, {})}
    return TaskDigests(
        task=_digest([{**kept, "version": version}]),
        questions=_digest([request.args, request.doc] for request in requests),
    )


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        text = json.dumps(value, sort_keys=True, default=str)
        # A function whose source is not available is written with its address in memory.
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", text).encode() + b"\n")
    return digest.hexdigest()[:_DIGITS]
