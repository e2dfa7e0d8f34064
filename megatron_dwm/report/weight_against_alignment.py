"""Does the weighting model want what helps? Weights against alignments, inside each batch.

A weight is right if units with a larger alignment (docs/METHOD.md, section 2) have a larger weight.
Alignments drift by orders of magnitude over a run, so they are compared inside the batch of one
step only: by their correlation, and standardized for the map of all rows.

Cost: two passes over the files. Memory: some numbers a recorded update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dwm.report.weight_rows import SOURCES, WeightBatch, WeightRows

_LARGEST = 3.0
_ALIGNMENT_BINS, _WEIGHT_BINS = 24, 1024
_PENDING = 1 << 20


@dataclass(frozen=True, kw_only=True)
class BatchCorrelation:
    """B batches with alignments, sorted by step. Several updates of one step count as one batch."""

    step_B: np.ndarray
    rows_B: np.ndarray
    correlation_B: np.ndarray
    """Pearson's r of weight and alignment; NaN if either is the same in all rows"""
    alignment_mean_B: np.ndarray
    alignment_std_B: np.ndarray
    key_B: np.ndarray
    """step and source"""

    def __len__(self) -> int:
        return len(self.step_B)


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """How many rows have which alignment and weight.

    alignment_edges, weight_edges: borders of the bins; alignments are in standard deviations of
    their batch, and the outermost bins have all beyond.
    """

    alignment_edges: np.ndarray
    weight_edges: np.ndarray
    counts_AW: np.ndarray
    mean_weight_A: np.ndarray
    """NaN in an empty bin"""

    def quantiles(self, fractions: Sequence[float]) -> np.ndarray:
        """Returns [A, fractions], quantiles of the weights in each bin of alignments, to the width
        of a bin of weights; NaN in an empty bin.
        """
        below_AW = self.counts_AW.cumsum(axis=1)
        centers = (self.weight_edges[:-1] + self.weight_edges[1:]) / 2
        found = np.full((len(below_AW), len(fractions)), np.nan)
        for at, below_W in enumerate(below_AW):
            if below_W[-1]:
                wanted = np.array(fractions) * below_W[-1]
                found[at] = centers[np.minimum(np.searchsorted(below_W, wanted), len(centers) - 1)]
        return found


def correlate_batches(weights: WeightRows) -> BatchCorrelation:
    """Correlate weight and alignment of every batch (one pass)."""
    keys, sums = np.zeros(0, np.int64), np.zeros((0, 6))
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    for rows in weights.batches():
        pending.append(_sums_of(_aligned(rows)))
        if sum(len(found) for found, _ in pending) > max(_PENDING, len(keys)):
            (keys, sums), pending = _merged([(keys, sums), *pending]), []
    keys, sums = _merged([(keys, sums), *pending])
    count_B = np.maximum(sums[:, 0], 1)
    weight_B, alignment_B = sums[:, 1] / count_B, sums[:, 2] / count_B
    variances = (sums[:, 3] / count_B - weight_B**2, sums[:, 4] / count_B - alignment_B**2)
    weight_std_B, alignment_std_B = (np.sqrt(np.maximum(found, 0.0)) for found in variances)
    covariance_B = sums[:, 5] / count_B - weight_B * alignment_B
    # Beyond rounding: a column of equal values has no correlation.
    varies = (weight_std_B > 1e-7) & (alignment_std_B > 1e-7 * np.abs(alignment_B))
    below_B = np.where(varies, weight_std_B * alignment_std_B, 1.0)
    return BatchCorrelation(
        step_B=keys // len(SOURCES),
        rows_B=sums[:, 0].astype(np.int64),
        correlation_B=np.where(varies, covariance_B / below_B, np.nan),
        alignment_mean_B=alignment_B,
        alignment_std_B=alignment_std_B,
        key_B=keys,
    )


def map_weights(weights: WeightRows, batches: BatchCorrelation) -> WeightMap | None:
    """Count rows by alignment and weight (one pass); None without alignments that differ."""
    if not len(batches) or not (batches.alignment_std_B > 0).any():
        return None
    alignment_edges = np.linspace(-_LARGEST, _LARGEST, _ALIGNMENT_BINS + 1)
    weight_edges = np.linspace(0.0, _largest_weight(weights), _WEIGHT_BINS + 1)
    counts, sums = np.zeros((_ALIGNMENT_BINS, _WEIGHT_BINS), np.int64), np.zeros(_ALIGNMENT_BINS)
    for rows in weights.batches():
        rows = _aligned(rows)
        at_R = np.searchsorted(batches.key_B, _keys(rows))
        std_R = batches.alignment_std_B[at_R]
        rows, at_R, std_R = rows.where(std_R > 0), at_R[std_R > 0], std_R[std_R > 0]
        standard_R = (rows.alignment_R - batches.alignment_mean_B[at_R]) / std_R
        column_R = _bins(standard_R, alignment_edges)
        cell_R = column_R * _WEIGHT_BINS + _bins(rows.weight_R, weight_edges)
        counts += np.bincount(cell_R, minlength=counts.size).reshape(counts.shape)
        sums += np.bincount(column_R, rows.weight_R, _ALIGNMENT_BINS)
    rows_A = counts.sum(axis=1)
    return WeightMap(
        alignment_edges=alignment_edges,
        weight_edges=weight_edges,
        counts_AW=counts,
        mean_weight_A=np.where(rows_A > 0, sums / np.maximum(rows_A, 1), np.nan),
    )


def _aligned(rows: WeightBatch) -> WeightBatch:
    return rows.where(~np.isnan(rows.alignment_R))


def _keys(rows: WeightBatch) -> np.ndarray:
    return rows.step_R * len(SOURCES) + rows.source_R


def _sums_of(rows: WeightBatch) -> tuple[np.ndarray, np.ndarray]:
    """Returns the batches of these rows, and of each: rows, w, a, w^2, a^2 and w a.

    Weights are taken from 1, their mean, which keeps the rounding of the differences small.
    """
    keys, inverse_R = np.unique(_keys(rows), return_inverse=True)
    w_R, a_R = rows.weight_R - 1.0, rows.alignment_R
    terms = (np.ones(len(w_R)), w_R, a_R, w_R**2, a_R**2, w_R * a_R)
    sums = [np.bincount(inverse_R, values_R, len(keys)) for values_R in terms]
    return keys, np.stack(sums, axis=1)


def _merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    every, sums = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    keys, inverse = np.unique(every, return_inverse=True)
    merged = np.zeros((len(keys), 6))
    np.add.at(merged, inverse, sums)
    return keys, merged


def _largest_weight(weights: WeightRows) -> float:
    largest = (rows.weight_R.max(initial=0.0) for rows in map(_aligned, weights.batches()))
    return max(1.0, *largest)


def _bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Returns the bin of each value; values beyond the edges are in the outermost bins."""
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
