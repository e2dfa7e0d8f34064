"""Paired differences by seed with their intervals, and losses at another amount of work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of paired differences and half the width of its 95 % interval (nan for one pair)."""

    mean: float
    half_width: float
    pairs: int

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean of one pair."""
        return self.mean - (0.0 if math.isnan(self.half_width) else self.half_width)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean of one pair."""
        return self.mean + (0.0 if math.isnan(self.half_width) else self.half_width)


def interval(values: Sequence[float]) -> Difference:
    """Returns the mean of differences with Student's t interval."""
    apart = np.asarray(values, dtype=np.float64)
    count = len(apart)
    half = math.nan
    if count > 1:
        quantile = float(student.ppf((1 + _CONFIDENCE) / 2, count - 1))
        half = quantile * float(apart.std(ddof=1)) / math.sqrt(count)
    return Difference(mean=float(apart.mean()), half_width=half, pairs=count)


def p_value(change: Difference, bound: float) -> float:
    """Returns the two-sided p of Student's test that the mean is `bound`; nan for one pair."""
    quantile = float(student.ppf((1 + _CONFIDENCE) / 2, change.pairs - 1))
    error = change.half_width / quantile
    if error == 0.0:
        return 0.0 if change.mean != bound else 1.0
    return float(2 * student.sf(abs(change.mean - bound) / error, change.pairs - 1))


def holm(p_values: Sequence[float]) -> list[bool]:
    """Returns which of several tests stand at 5 % by the step-down method of Holm (1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    stands = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > (1 - _CONFIDENCE) / (len(p_values) - rank):
            break
        stands[i] = True
    return stands


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Returns the mean of ours - theirs, pair by pair, with Student's t interval."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def at_equal_work(flops: float, uniform: Sequence[tuple[float, float]]) -> float | None:
    """Returns uniform's loss after `flops`, linear in the logarithm of work between its runs.

    uniform: (work, last loss) of runs of different lengths, each with its whole schedule. None for
    work outside their range, by more than 1 %.
    """
    points = sorted(uniform)
    if not points or not 0.99 * points[0][0] <= flops <= 1.01 * points[-1][0]:
        return None
    work = np.log([point[0] for point in points])
    return float(np.interp(math.log(flops), work, [point[1] for point in points]))
