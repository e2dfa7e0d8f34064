"""Global batches by number, before they are split over replicas: the corpus, and a mixture.

A source has no state, so a resumed run reads the same batches as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_dwm.data.batch import Batch
from megatron_dwm.data.stream import TrainingData
from megatron_dwm.data.validation import ValidationSet

Numbering = Literal["training", "update", "target"]
"""what a sample's number counts: samples that the LLM trains on, samples that a fresh weighting
update drew, or passages of the target"""


@dataclass(frozen=True, kw_only=True)
class Origins:
    """The origins of the units of a global batch, without their text.

    sample_ids_U, document_ids_U: int64. tokens_U: int64, input tokens of each unit. domains,
    numberings: one per unit.
    """

    sample_ids_U: Tensor
    document_ids_U: Tensor
    tokens_U: Tensor
    domains: tuple[str, ...]
    numberings: tuple[Numbering, ...]


class Source(Protocol):
    """Global batches of `size` rows."""

    @property
    def size(self) -> int: ...

    def rows(self, number: int, start: int, stop: int) -> Batch:
        """Returns rows `start` to `stop - 1` of batch `number` (from 0), on the CPU."""
        ...

    def origins(self, number: int, count: int | None = None) -> Origins:
        """Returns the origins of batch `number`; reads no token of the corpus.

        count: only of its first `count` rows.
        """
        ...

    def sample_range(self, number: int) -> range:
        """Returns the numbers of the corpus samples in batch `number`."""
        ...


@dataclass(frozen=True)
class CorpusSource:
    """Batches of `size` samples of the training data, in its order."""

    data: TrainingData
    size: int
    numbering: Numbering = "training"

    def rows(self, number: int, start: int, stop: int) -> Batch:
        """Returns rows of batch `number`."""
        return self.data.batch(self.sample_range(number)[start:stop])

    def origins(self, number: int, count: int | None = None) -> Origins:
        """Returns the origins of batch `number`."""
        return _origins(self.data, self.sample_range(number)[:count], self.numbering)

    def sample_range(self, number: int) -> range:
        """Returns the numbers of the samples in batch `number`."""
        return range(number * self.size, (number + 1) * self.size)

    def chosen(self, number: int, rows: Sequence[int]) -> ChosenSource:
        """Returns the batch of these rows of batch `number`, in this order."""
        samples = self.sample_range(number)
        return ChosenSource(self.data, tuple(samples[row] for row in rows))


@dataclass(frozen=True)
class ChosenSource:
    """One batch: the samples of the training data with these numbers."""

    data: TrainingData
    samples: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Batch:
        """Returns rows `start` to `stop - 1`, on the CPU."""
        return self.data.batch(self.samples[start:stop])

    def origins(self) -> Origins:
        """Returns the origins of the batch; reads no token."""
        return _origins(self.data, self.samples, "training")


def _origins(data: TrainingData, samples: Sequence[int], numbering: Numbering) -> Origins:
    found = data.origins(samples)
    return Origins(
        sample_ids_U=torch.tensor(found.samples, dtype=torch.int64),
        document_ids_U=torch.tensor(found.documents, dtype=torch.int64),
        tokens_U=torch.tensor(found.tokens, dtype=torch.int64),
        domains=tuple(found.domains),
        numberings=(numbering,) * len(found.samples),
    )


@dataclass(frozen=True)
class MixedSource:
    """The batches of `corpus`, with passages of the target as their last `num_mixed` rows."""

    corpus: Source
    target: ValidationSet
    num_mixed: int

    @property
    def size(self) -> int:
        """Number of rows in a batch."""
        return self.corpus.size

    def rows(self, number: int, start: int, stop: int) -> Batch:
        """Returns rows of batch `number`; passages of the target come last."""
        first, last = max(0, start - self._border), max(0, stop - self._border)
        if first == last:
            return self.corpus.rows(number, start, stop)
        passages = self.target.batch(number, self.num_mixed).rows(first, last)
        if start >= self._border:
            return passages
        return Batch.concatenate([self.corpus.rows(number, start, self._border), passages])

    def origins(self, number: int, count: int | None = None) -> Origins:
        """Returns the origins of batch `number`."""
        kept = self._border if count is None else min(count, self._border)
        corpus = self.corpus.origins(number, kept)
        passages = self.target.batch(number, self.num_mixed)
        if count is not None:
            passages = passages.rows(0, max(0, count - self._border))
        units = passages.units
        numbered: list[Numbering] = ["target"] * units.count
        per_row = torch.tensor(passages.origins_per_row)
        ones_BS = torch.ones_like(passages.loss_mask_BS)
        columns = (
            (corpus.sample_ids_U, passages.sample_ids_B.repeat_interleave(per_row)),
            (corpus.document_ids_U, passages.document_ids_U),
            (corpus.tokens_U, units.sum_of_rows(ones_BS).long()),
        )
        samples_U, documents_U, tokens_U = (torch.cat(pair) for pair in columns)
        return Origins(
            sample_ids_U=samples_U,
            document_ids_U=documents_U,
            tokens_U=tokens_U,
            domains=(*corpus.domains, *passages.domains),
            numberings=(*corpus.numberings, *numbered),
        )

    def sample_range(self, number: int) -> range:
        """Returns the numbers of the corpus samples of batch `number`, also of replaced ones."""
        return self.corpus.sample_range(number)

    @property
    def _border(self) -> int:
        return self.size - self.num_mixed
