"""What the runs of a study reached, and paired differences by seed with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from examples.study.launch import is_finished
from examples.study.spec import Run
from examples.study.workplace import Workplace
from megatron_dwm.report.run_files import read_metrics

_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run.

    losses: last held-out loss by domain, nats a token. flops: of the whole run. seconds: of its
    loop. sample_size: mean effective sample size of the last fifth of the steps.
    """

    losses: Mapping[str, float]
    flops: float
    seconds: float
    sample_size: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of paired differences and half the width of its 95 % interval (nan for one pair)."""

    mean: float
    half_width: float
    pairs: int


def outcomes(place: Workplace, runs: Iterable[Run]) -> dict[str, Outcome]:
    """Returns the outcomes of finished runs by name."""
    found = {run.name: place.directory(run) for run in runs}
    return {name: outcome_of(path) for name, path in found.items() if is_finished(path)}


def outcome_of(directory: Path) -> Outcome:
    """Returns the outcome of a finished run."""
    lines = read_metrics(directory)
    evaluations = [line for line in lines if line["phase"] == "evaluation"]
    steps = [line for line in lines if line["phase"] == "train"]
    last = steps[-max(len(steps) // 5, 1) :]
    return Outcome(
        losses=evaluations[-1]["domain_loss"],
        flops=steps[-1]["flops"],
        seconds=steps[-1]["seconds"],
        sample_size=float(np.mean([line["weight_effective_sample_size"] for line in last])),
    )


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Returns the mean of ours - theirs, pair by pair, with Student's t interval."""
    apart = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    count = len(apart)
    half = math.nan
    if count > 1:
        quantile = float(student.ppf((1 + _CONFIDENCE) / 2, count - 1))
        half = quantile * float(apart.std(ddof=1)) / math.sqrt(count)
    return Difference(mean=float(apart.mean()), half_width=half, pairs=count)


def at_equal_work(flops: float, uniform: Sequence[tuple[float, float]]) -> float:
    """Returns uniform's loss after `flops`, linear in the logarithm of work between its runs.

    uniform: (work, last loss) of runs of different lengths, each with its whole schedule. Work
    outside their range takes the nearest run.
    """
    points = sorted(uniform)
    work = np.log([point[0] for point in points])
    return float(np.interp(math.log(flops), work, [point[1] for point in points]))
