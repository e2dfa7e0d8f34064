"""What a run recorded of every document in every stage, summed over its rows.

Training samples and samples of fresh updates are rows of the same documents (the second read them
in another order), so both count. Passages of the target are no documents of the corpus.

Credit is the first-order part of In-Run Data Shapley (Wang et al. 2024, arXiv 2406.11011): the sum
over recorded updates of eta s, with eta the learning rate of the step and s = <z, gradient of the
unit's loss> (docs/METHOD.md, section 2), where the paper has the plain gradient of the validation
loss in the place of z. `drop` also has the unit's share of the batch and its weight: the sum of
eta s w tokens / (tokens of the batch), in nats, is what the recorded updates' steps took off the
validation loss through this document, to first order.

Cost: two passes over the files. Memory: about 70 bytes a document and stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dwm.report.learning_rates import LearningRates
from megatron_dwm.report.weight_rows import UPDATE, WeightBatch, WeightRows

_STAGE_BITS = 16
_PENDING = 1 << 21
_KINDS = {
    **{"rows": np.int32, "tokens": np.float64, "weight": np.float64, "aligned": np.int32},
    **{"alignment": np.float64, "credit": np.float64, "drop": np.float64},
}


@dataclass(frozen=True, kw_only=True)
class DocumentSums:
    """K documents of stages, sorted by document, then stage."""

    document_K: np.ndarray
    stage_K: np.ndarray
    domain_K: np.ndarray
    """an index into `WeightRows.domains`"""
    rows_K: np.ndarray
    """recorded weights"""
    tokens_K: np.ndarray
    """their tokens"""
    weight_K: np.ndarray
    """mean weight, in proportion to tokens"""
    aligned_K: np.ndarray
    """those of the rows that have an alignment"""
    alignment_K: np.ndarray
    """their mean alignment; NaN without one"""
    credit_K: np.ndarray
    """sum of eta s"""
    drop_K: np.ndarray
    """sum of eta s w times the unit's share of the batch, in nats"""

    def __len__(self) -> int:
        return len(self.document_K)

    @property
    def stages(self) -> list[int]:
        """The stages, in order."""
        return np.unique(self.stage_K).tolist()

    def where(self, chosen: np.ndarray) -> DocumentSums:
        """The chosen entries: a mask or numbers."""
        return DocumentSums(**{name: values[chosen] for name, values in vars(self).items()})

    def over_stages(self) -> DocumentSums:
        """One entry a document, whose stage is the first that has it."""
        if not len(self) or len(starts := self._starts()) == len(self):
            return self

        def total(values_K: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values_K, starts)

        tokens, aligned = total(self.tokens_K), total(self.aligned_K)
        alignments = total(np.where(self.aligned_K > 0, self.alignment_K * self.aligned_K, 0.0))
        return DocumentSums(
            document_K=self.document_K[starts],
            stage_K=self.stage_K[starts],
            domain_K=self.domain_K[starts],
            rows_K=total(self.rows_K),
            tokens_K=tokens,
            weight_K=_divided(total(self.weight_K * self.tokens_K), tokens),
            aligned_K=aligned,
            alignment_K=_divided(alignments, aligned),
            credit_K=total(self.credit_K),
            drop_K=total(self.drop_K),
        )

    def _starts(self) -> np.ndarray:
        """Returns the first entry of each document."""
        return np.flatnonzero(np.diff(self.document_K, prepend=self.document_K[0] - 1))


def sum_documents(
    weights: WeightRows, rates: LearningRates | None, tokens_in_batch: int | None
) -> DocumentSums:
    """Sum the rows of a run by document and stage.

    rates: without them credits are 0. tokens_in_batch: of a global batch; without it drops are NaN.
    """
    keys = _distinct_keys(weights)
    domain = np.zeros(len(keys), np.int32)
    sums = {name: np.zeros(len(keys), kind) for name, kind in _KINDS.items()}
    for rows in weights.batches():
        rows = rows.where(rows.of_corpus_R)
        found, inverse_R = np.unique(_keys(rows), return_inverse=True)
        # Sorted ones are found several times faster than the rows' own keys.
        at = np.searchsorted(keys, found)
        domain[at[inverse_R]] = rows.domain_R
        for name, values_R in _terms(rows, rates, tokens_in_batch).items():
            sums[name][at] += np.bincount(inverse_R, values_R, len(at)).astype(_KINDS[name])
    stage = (keys & ((1 << _STAGE_BITS) - 1)).astype(np.int32)
    # In place: there may be very many documents.
    keys >>= _STAGE_BITS
    return DocumentSums(
        document_K=keys,
        stage_K=stage,
        domain_K=domain,
        rows_K=sums["rows"],
        tokens_K=sums["tokens"],
        weight_K=_divided(sums["weight"], sums["tokens"]),
        aligned_K=sums["aligned"],
        alignment_K=_divided(sums["alignment"], sums["aligned"]),
        credit_K=sums["credit"],
        drop_K=sums["drop"],
    )


def rates_of_rows(rows: WeightBatch, rates: LearningRates) -> np.ndarray:
    """The learning rate of each row's step.

    A fresh update carries the number of the step before it, and its virtual step would be the next.
    """
    return rates.at(rows.step_R + (rows.source_R == UPDATE))


def _terms(
    rows: WeightBatch, rates: LearningRates | None, tokens_in_batch: int | None
) -> dict[str, np.ndarray]:
    """Returns what each row adds to every sum."""
    aligned_R = ~np.isnan(rows.alignment_R)
    alignment_R = np.where(aligned_R, rows.alignment_R, 0.0)
    credit_R = alignment_R * (0.0 if rates is None else rates_of_rows(rows, rates))
    share = np.nan if tokens_in_batch is None else 1.0 / tokens_in_batch
    return {
        "rows": np.ones(len(rows.step_R)),
        "tokens": rows.tokens_R,
        "weight": rows.weight_R * rows.tokens_R,
        "aligned": aligned_R.astype(np.float64),
        "alignment": alignment_R,
        "credit": credit_R,
        "drop": credit_R * rows.weight_R * rows.tokens_R * share,
    }


def _keys(rows: WeightBatch) -> np.ndarray:
    return (rows.document_R << _STAGE_BITS) | rows.stage_R


def _distinct_keys(weights: WeightRows) -> np.ndarray:
    """Returns the sorted keys of all rows; merges whenever many have gathered."""
    found, pending = np.zeros(0, np.int64), list[np.ndarray]()
    for rows in weights.batches():
        pending.append(_distinct([_keys(rows.where(rows.of_corpus_R))]))
        if sum(map(len, pending)) > max(_PENDING, len(found)):
            found, pending = _distinct([found, *pending]), []
    return _distinct([found, *pending])


def _distinct(parts: list[np.ndarray]) -> np.ndarray:
    """Returns the sorted distinct values; numpy's `unique` hashes them, which takes far longer."""
    every = np.sort(np.concatenate(parts))
    return every[np.diff(every, prepend=every[:1] - 1) != 0]


def _divided(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns sums / counts, in the memory of the sums; NaN where there is nothing to count."""
    with np.errstate(invalid="ignore"):
        return np.divide(sums, counts, out=sums)
