"""Numbers of a run for tables, computed from its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dwm.report.run_files import WeightRecords, read_weights


@dataclass(frozen=True, kw_only=True)
class Series:
    """A quantity over optimizer steps."""

    step: np.ndarray
    value: np.ndarray


def mean_weight_by_domain(run_dir: str | Path, last_steps: int) -> dict[str, float]:
    """Returns the mean weight of each domain's samples over the last `last_steps` steps.

    Steps count back from the last one with recorded weights. A domain without samples there is left
    out.

    Raises:
        UserError: as `read_weights`.
    """
    records = read_weights(Path(run_dir))
    recent = records.step > records.step.max() - last_steps
    sums, counts = _sums_by_domain(records, recent)
    return {name: float(sums[i] / counts[i]) for i, name in enumerate(records.domains) if counts[i]}


def held_out_loss(metrics: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """Returns the held-out loss (nats a token) of each domain at every evaluation, by name."""
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


def _sums_by_domain(records: WeightRecords, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each domain's sum of weights and number of samples among the chosen rows."""
    codes, size = records.domain_code[rows], len(records.domains)
    sums = np.bincount(codes, weights=records.weight[rows], minlength=size)
    return sums, np.bincount(codes, minlength=size)
