"""Numbers of a run for tables, computed from its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dwm.config import UserError
from megatron_dwm.report.weight_stream import codes, stream, trained_on, weight_files


@dataclass(frozen=True, kw_only=True)
class Series:
    """A quantity over optimizer steps."""

    step: np.ndarray
    value: np.ndarray


def mean_weight_by_domain(run_dir: str | Path, last_steps: int) -> dict[str, float]:
    """Returns the mean weight of each domain's samples over the last `last_steps` steps.

    Of the samples that the LLM trained on. Steps count back from the last one with weights;
    a domain without samples there is left out.

    Raises:
        UserError: the run recorded no weights, or a file of them is broken.
    """
    files = weight_files(Path(run_dir))
    if not files:
        raise UserError(
            f"{run_dir} has no weights in weights/*.parquet: run with "
            "logging.weights_interval_steps above 0, or wait for the first checkpoint, with which "
            "they are written"
        )
    first, names = files.steps[-1] - last_steps + 1, dict[str, int]()
    code, weight = [], []
    for batch in stream(files, ("step", "source", "domain", "weight")):
        recent = trained_on(batch) & (batch["step"].to_numpy() >= first)
        code.append(codes(batch["domain"], names)[recent])
        weight.append(batch["weight"].to_numpy().astype(np.float64)[recent])
    sums = np.bincount(np.concatenate(code), np.concatenate(weight), minlength=len(names))
    counts = np.bincount(np.concatenate(code), minlength=len(names))
    return {name: float(sums[i] / counts[i]) for name, i in names.items() if counts[i]}


def held_out_loss(metrics: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """Returns the held-out loss (nats per token) of each domain at every evaluation, by name."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in metrics:
        if _has(record, "evaluation", "domain_loss"):
            for name, loss in record["domain_loss"].items():
                points.setdefault(name, []).append((record["step"], loss))
    return {name: _series(points[name]) for name in sorted(points)}


def _has(record: dict[str, Any], phase: str, key: str) -> bool:
    return record["phase"] == phase and record.get(key) is not None


def _series(pairs: Sequence[tuple[float, float]]) -> Series:
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return Series(step=table[:, 0], value=table[:, 1])
