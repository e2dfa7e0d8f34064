"""Correlation of weights with the scores of documents, over the run (the DWM paper's figure on
preferences; arXiv 2507.16178).

Pearson's r over the rows of an interval of steps: a row's weight, and the score of its document. A
row is a recorded unit, so a document that was read twice counts twice. With `weighting.unit sample`
the document of a row is the one with most of its tokens.

Cost: one pass over the files. Memory: the scores of the documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dwm.report.weight_rows import WeightBatch, WeightRows

_TERMS = 6


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of K documents, sorted by document."""

    names: tuple[str, ...]
    document_K: np.ndarray
    values_KC: np.ndarray
    """a column a name; NaN where a document has no score"""

    def at(self, document_R: np.ndarray) -> np.ndarray:
        """Returns the scores of each of these documents, NaN for one that is not here."""
        found = np.full((len(document_R), len(self.names)), np.nan)
        if len(self.document_K):
            # Sorted ones are found several times faster than the rows' own documents.
            documents, inverse_R = np.unique(document_R, return_inverse=True)
            at = np.minimum(np.searchsorted(self.document_K, documents), len(self) - 1)
            here_R = (self.document_K[at] == documents)[inverse_R]
            found[here_R] = self.values_KC[at[inverse_R[here_R]]]
        return found

    def __len__(self) -> int:
        return len(self.document_K)


@dataclass(frozen=True, kw_only=True)
class ScoreCorrelation:
    """Correlations with C scores in T intervals of steps."""

    names: tuple[str, ...]
    step_T: np.ndarray
    """mean step of the interval's rows"""
    rows_TC: np.ndarray
    correlation_TC: np.ndarray
    """NaN with fewer than three rows, or if weights or scores are all the same"""


def correlate_scores(
    weights: WeightRows, scores: Scores, first_step: int, last_step: int, max_intervals: int = 40
) -> ScoreCorrelation:
    """Correlate the weights with each score in equal intervals of steps.

    first_step, last_step: of the recorded weights.
    """
    intervals = max(1, min(max_intervals, last_step - first_step + 1))
    edges = np.linspace(first_step, last_step + 1, intervals + 1)
    center_C, scale_C = _center_and_scale(scores.values_KC)
    sums = np.zeros((intervals, len(scores.names), _TERMS))
    steps = np.zeros((2, intervals))
    for rows in weights.batches():
        rows = rows.where(rows.of_corpus_R)
        found_RC = (scores.at(rows.document_R) - center_C) / scale_C
        at_R = np.clip(np.searchsorted(edges, rows.step_R, side="right") - 1, 0, intervals - 1)
        _add(sums, at_R, rows, found_RC)
        any_R = ~np.isnan(found_RC).all(axis=1)
        steps += [
            np.bincount(at_R[any_R], minlength=intervals),
            np.bincount(at_R[any_R], rows.step_R[any_R], intervals),
        ]
    seen = steps[0] > 0
    return ScoreCorrelation(
        names=scores.names,
        step_T=steps[1, seen] / steps[0, seen],
        rows_TC=sums[seen, :, 0].astype(np.int64),
        correlation_TC=_correlation(sums[seen]),
    )


def _add(sums: np.ndarray, at_R: np.ndarray, rows: WeightBatch, found_RC: np.ndarray) -> None:
    """Add count, w, s, w^2, s^2 and w s of the rows to the sums of their intervals, in place."""
    for column in range(sums.shape[1]):
        known_R = ~np.isnan(found_RC[:, column])
        w_R, s_R = rows.weight_R[known_R] - 1.0, found_RC[known_R, column]
        terms = (np.ones(len(w_R)), w_R, s_R, w_R**2, s_R**2, w_R * s_R)
        for number, values_R in enumerate(terms):
            sums[:, column, number] += np.bincount(at_R[known_R], values_R, len(sums))


def _correlation(sums: np.ndarray) -> np.ndarray:
    count, w, s, ww, ss, ws = np.moveaxis(sums, -1, 0)
    n = np.maximum(count, 1)
    spread_w, spread_s = ww / n - (w / n) ** 2, ss / n - (s / n) ** 2
    # Beyond rounding: a column of equal values has no correlation.
    varies = (count > 2) & (spread_w > 1e-14) & (spread_s > 1e-14)
    below = np.sqrt(np.where(varies, spread_w * spread_s, 1.0))
    return np.where(varies, (ws / n - w * s / n**2) / below, np.nan)


def _center_and_scale(values_KC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each column; scores of any size then round alike.

    A column at a time, since there may be very many documents.
    """
    center_C, scale_C = np.zeros(values_KC.shape[1]), np.ones(values_KC.shape[1])
    for column, values_K in enumerate(values_KC.T):
        known = values_K[~np.isnan(values_K)]
        if len(known):
            center_C[column], scale_C[column] = known.mean(), known.std() or 1.0
    return center_C, scale_C
