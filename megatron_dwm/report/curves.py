"""Numbers over a run: binned curves, and their mean and band over the runs of a group.

A curve has at most `MAX_BINS` points, each the mean of consecutive steps, so that a page with many
curves stays small. Every point has the four abscissas: step, tokens, FLOPs and time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megatron_dwm.report.content import Cell, Column
from megatron_dwm.report.runs import Group, Run, RunSet

MAX_BINS = 200
_ABSCISSAS = ("step", "tokens", "flops", "seconds")
# Longest time that is still shown in a unit, in seconds.
_TIME_UNITS = ((180.0, 1.0, "s"), (3 * 3600.0, 60.0, "min"), (float("inf"), 3600.0, "h"))
Value = Callable[[Mapping[str, Any]], Any]


def key(name: str) -> Value:
    """Returns the function that takes a number from a line of `metrics.jsonl` by its key."""
    return lambda line: line.get(name)


def within(name: str, inner: str) -> Value:
    """Returns the function that takes a domain's number from a line."""
    return lambda line: (line.get(name) or {}).get(inner)


def time_unit(runs: RunSet) -> tuple[float, str]:
    """Returns how many seconds the unit of time has that suits the longest run, and its name."""
    longest = max((float(run.last("seconds") or 0.0) for run in runs.runs), default=0.0)
    return next((size, name) for most, size, name in _TIME_UNITS if longest <= most)


def abscissas(runs: RunSet) -> tuple[Column, ...]:
    """Returns the columns of the four abscissas."""
    return (
        Column(name="step", title="optimizer step"),
        Column(name="tokens", title="training tokens"),
        Column(name="flops", title="work so far", unit="FLOPs"),
        Column(name="time", title="wall-clock time", unit=time_unit(runs)[1]),
    )


def points(run: Run, phase: str, value: Value) -> np.ndarray:
    """Returns step, tokens, FLOPs, seconds and value of the lines with a finite one [N, 5].

    Abscissas that a line lacks are NaN.
    """
    rows = [
        [*(line.get(name) for name in _ABSCISSAS), value(line)]
        for line in run.lines(phase)
        if _is_number(value(line))
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def group_rows(
    runs: RunSet, group: Group, phase: str, value: Value, steps: np.ndarray | None = None
) -> list[list[float]]:
    """Returns a group's curve: step, tokens, FLOPs, time, mean, lowest and highest of the runs.

    steps: the only ones that count; None: all.
    Steps that not every run of the group has reached are left out: the mean would jump there. Runs
    without any value are not counted.
    """
    found = [points(run, phase, value) for run in group.runs]
    if steps is not None:
        found = [rows[np.isin(rows[:, 0], steps)] for rows in found]
    found = [rows for rows in found if len(rows)]
    if not found:
        return []
    edges = bin_edges(np.concatenate([rows[:, 0] for rows in found]))
    binned = np.stack([_bin_means(rows, edges) for rows in found])
    whole = ~np.isnan(binned[:, :, 0]).any(axis=0)
    mean = binned[:, whole].mean(axis=0)
    mean[:, 3] /= time_unit(runs)[0]
    values = binned[:, whole, 4]
    table = np.column_stack([mean, values.min(axis=0), values.max(axis=0)])
    return table.tolist()


def bin_edges(steps: np.ndarray, max_bins: int = MAX_BINS) -> np.ndarray:
    """Returns the edges of bins of steps: one for each step, or equal ones if steps are many."""
    different = np.unique(steps)
    if len(different) <= max_bins:
        return np.append(different, different[-1] + 1)
    return np.linspace(different[0], different[-1] + 1, max_bins + 1)


def bin_of(steps: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Returns the number of each step's bin."""
    last = len(edges) - 2
    return np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, last)


def _bin_means(rows: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Returns the mean of the rows in each bin [bins, 5]; NaN where there are none."""
    bins, number = len(edges) - 1, bin_of(rows[:, 0], edges)
    count = np.bincount(number, minlength=bins)
    sums = [np.bincount(number, weights=rows[:, i], minlength=bins) for i in range(rows.shape[1])]
    with np.errstate(invalid="ignore"):
        return np.column_stack(sums) / np.where(count, count, np.nan)[:, None]


def stage_marks(run: Run, runs: RunSet) -> dict[str, list[Cell]]:
    """Returns where every stage after the first begins: step, tokens, FLOPs and time."""
    size = time_unit(runs)[0]
    first: dict[Any, list[Cell]] = {}
    for line in run.lines("train"):
        if line.get("stage") is not None and line["stage"] not in first:
            seconds = line.get("seconds")
            time = None if seconds is None else seconds / size
            first[line["stage"]] = [line["step"], line.get("tokens"), line.get("flops"), time]
    rows = list(first.values())[1:]
    return {
        name: [row[i] for row in rows] for i, name in enumerate(("step", "tokens", "flops", "time"))
    }


def at_steps(run: Run, runs: RunSet, steps: np.ndarray) -> np.ndarray:
    """Returns step, tokens, FLOPs and time at any steps of a run, by interpolation [N, 4].

    What the run did not record is NaN.
    """
    columns = [steps]
    for name, size in (("tokens", 1.0), ("flops", 1.0), ("seconds", time_unit(runs)[0])):
        known = points(run, "train", key(name))
        if len(known):
            columns.append(np.interp(steps, known[:, 0], known[:, 4] / size))
        else:
            columns.append(np.full(len(steps), np.nan))
    return np.column_stack(columns)
