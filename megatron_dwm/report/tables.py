"""Numbers of a run for tables and plots, computed from its files."""

from __future__ import annotations

from collections import Counter
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


def weight_by_domain_over_steps(records: WeightRecords, max_bins: int = 40) -> dict[str, Series]:
    """Returns the mean weight of each domain in equal bins of steps, at the bin's mean step.

    A bin without samples of a domain is left out of that domain's series. There are at most as many
    bins as recorded steps.
    """
    steps = np.unique(records.step)
    num_bins = min(max_bins, len(steps))
    edges = np.linspace(steps[0], steps[-1] + 1, num_bins + 1)
    bin_of_row = np.clip(np.searchsorted(edges, records.step, side="right") - 1, 0, num_bins - 1)
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in records.domains}
    for number in range(num_bins):
        inside = bin_of_row == number
        if not inside.any():
            continue
        middle = float(np.unique(records.step[inside]).mean())
        sums, counts = _sums_by_domain(records, inside)
        for i, name in enumerate(records.domains):
            if counts[i]:
                points[name].append((middle, sums[i] / counts[i]))
    return {name: _series(pairs) for name, pairs in points.items()}


def first_steps_of_stages(records: WeightRecords) -> list[int]:
    """Returns the first recorded step of every stage after the first."""
    stages = np.unique(records.stage)
    return [int(records.step[records.stage == stage].min()) for stage in stages[1:]]


def training_loss(metrics: Sequence[dict[str, Any]], max_bins: int = 200) -> Series:
    """Returns the training loss (nats a token), averaged over bins of consecutive steps."""
    pairs = [(r["step"], r["loss"]) for r in metrics if _has(r, "train", "loss")]
    num_bins = min(max_bins, len(pairs))
    if num_bins == 0:
        return _series([])
    chunks = np.array_split(np.array(pairs, dtype=np.float64), num_bins)
    return _series([tuple(chunk.mean(axis=0)) for chunk in chunks])


def skipped(metrics: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Returns how many steps and weighting updates were skipped, by "what: reason"."""
    names = {"skipped": "step", "skipped_update": "weighting update"}
    found = [r for r in metrics if r["phase"] in names]
    return dict(Counter(f"{names[r['phase']]}: {r.get('reason', 'unknown')}" for r in found))


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
