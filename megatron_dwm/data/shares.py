"""The shares of the prefixes of `data.train`: one for the whole run, or by step (`data.schedule`).

The shares of step t hold for all samples that are read at step t. Which samples those are follows
from a `ReadSteps` alone, so nothing here depends on the layout or on the length of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_dwm.config.blend import BlendPart
from megatron_dwm.config.schema import DataConfig


@dataclass(frozen=True, kw_only=True)
class ReadSteps:
    """When samples are read: sample k at step `steps[k // samples_each]` (from 0)."""

    steps: Sequence[int]
    samples_each: int

    @property
    def num_samples(self) -> int:
        """Number of samples that are read in all."""
        return len(self.steps) * self.samples_each


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of P prefixes that are constant in each of S segments of the samples.

    starts_S: int64, the first sample of every segment, rising from 0. The last has no end.
    shares_SP: float64; a row has the sum 1.
    """

    starts_S: np.ndarray
    shares_SP: np.ndarray

    def at(self, samples_N: np.ndarray) -> np.ndarray:
        """Returns float64 [N, P], the shares of these samples."""
        return self.shares_SP[self._segments(samples_N)]

    def before(self, samples_N: np.ndarray) -> np.ndarray:
        """Returns float64 [N, P], for each number of samples the sum of the shares of so many.

        Within the first segment it is number times share, as Megatron-Core computes it.
        """
        segments_N = self._segments(samples_N)
        inside_N = (samples_N - self.starts_S[segments_N]).astype(np.float64)
        within_NP = inside_N[:, None] * self.shares_SP[segments_N]
        return self._sums_SP[segments_N] + within_NP

    def _segments(self, samples_N: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts_S, samples_N, side="right") - 1

    @cached_property
    def _sums_SP(self) -> np.ndarray:
        """The sums of the shares of all samples before each segment."""
        lengths = np.diff(self.starts_S).astype(np.float64)
        sums = np.cumsum(lengths[:, None] * self.shares_SP[:-1], axis=0)
        return np.concatenate([np.zeros((1, self.shares_SP.shape[1])), sums])


def shares_of_samples(
    data: DataConfig,
    parts: Sequence[BlendPart],
    per_epoch: Sequence[int],
    read_at: ReadSteps | None,
) -> Shares:
    """Returns the shares of the parts by sample.

    per_epoch: samples of every part in an epoch. read_at: needed with a schedule only.
    """
    if not data.schedule:
        weights_P = _constant(parts, per_epoch)
        return Shares(
            starts_S=np.zeros(1, dtype=np.int64), shares_SP=(weights_P / weights_P.sum())[None]
        )
    assert read_at is not None, "a schedule needs the steps at which samples are read"
    shares_TP = _scheduled(data, parts, np.asarray(read_at.steps, dtype=np.int64))
    changes = np.any(shares_TP[1:] != shares_TP[:-1], axis=1)
    firsts_S = np.concatenate([[0], 1 + np.flatnonzero(changes)])
    if not len(shares_TP):  # nothing is read, as by a run without updates
        firsts_S, shares_TP = firsts_S[:1], _scheduled(data, parts, np.zeros(1, dtype=np.int64))
    return Shares(starts_S=firsts_S * read_at.samples_each, shares_SP=shares_TP[firsts_S])


def shares_of_run(
    data: DataConfig, parts: Sequence[BlendPart], sizes: Sequence[int], steps: int
) -> np.ndarray:
    """Returns float64 [P], the shares of the parts in a run of `steps` steps, in any scale.

    sizes: of the parts, to which their shares are in proportion without weights.
    """
    if not data.schedule:
        return _constant(parts, sizes)
    return _scheduled(data, parts, np.arange(steps)).mean(axis=0)


def _constant(parts: Sequence[BlendPart], sizes: Sequence[int]) -> np.ndarray:
    raw = [
        size * len(part.places) if part.weight is None else part.weight
        for part, size in zip(parts, sizes, strict=True)
    ]
    return np.array(raw, dtype=np.float64)


def _scheduled(data: DataConfig, parts: Sequence[BlendPart], steps_T: np.ndarray) -> np.ndarray:
    """Returns float64 [T, P], the shares of the parts at these steps."""
    points_Q = np.array(list(data.schedule), dtype=np.int64)
    shares_QP = np.array([_at_point(row, parts) for row in data.schedule.values()])
    places_T = np.searchsorted(points_Q, steps_T, side="right") - 1
    shares_TP = shares_QP[places_T]
    if data.schedule_interpolation == "constant" or len(points_Q) == 1:
        return shares_TP
    next_T = np.minimum(places_T + 1, len(points_Q) - 1)
    lengths_T = np.maximum(points_Q[next_T] - points_Q[places_T], 1)
    progress_T = (steps_T - points_Q[places_T]) / lengths_T
    # After the last point both ends are the same, and equal ends give their value exactly.
    return shares_TP + progress_T[:, None] * (shares_QP[next_T] - shares_TP)


def _at_point(row: Sequence[float], parts: Sequence[BlendPart]) -> np.ndarray:
    """Returns float64 [P], the shares of a point with sum 1; a part has those of all its places."""
    raw_P = np.array([sum(row[place] for place in part.places) for part in parts], dtype=np.float64)
    return raw_P / raw_P.sum()
