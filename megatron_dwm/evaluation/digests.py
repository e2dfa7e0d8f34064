"""What a task asked, as two digests, so that figures of different questions are not compared.

    task       its definition: templates, metrics, filters, shots, and the code that it names
    questions  every text that the model was given, in order, with the record it was made of

Neither depends on where files lie. Cost: one pass over the questions, which are in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Where data lie, what a machine adds, and the name, which the scores have.
_ELSEWHERE = (
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "custom_dataset",
    "metadata",
    "task",
)
_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Hexadecimal digests; None in records that were written before there were any."""

    task: str | None = None
    questions: str | None = None


def asked_by(definition: Mapping[str, Any], requests: Iterable[Any]) -> Asked:
    """The digests of a task that has been run.

    requests: the harness's, each with its `args` (texts for the model) and `doc` (a record).
    """
    kept = {key: value for key, value in definition.items() if key not in _ELSEWHERE}
    version = (definition.get("metadata") or {}).get("version")
    return Asked(
        task=_digest([{**kept, "version": version}]),
        questions=_digest([request.args, request.doc] for request in requests),
    )


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        text = json.dumps(value, sort_keys=True, default=str)
        # A function whose source cannot be had is spelled with its place in memory.
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", text).encode() + b"\n")
    return digest.hexdigest()[:_DIGITS]
