"""Global batches by number, before they are cut into replicas: the corpus, and the corpus mixed.

A source reads what it is asked for and keeps no state, so a run that goes on reads the same batches
as one that was never stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_dwm.data.batch import Batch
from megatron_dwm.data.stream import TrainingData
from megatron_dwm.data.validation import ValidationSet

Numbering = Literal["training", "update", "target"]
"""What a sample's number counts in: samples that the LLM trains on, samples that a weighting update
drew for itself, passages of the target."""


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the rows of a global batch come from; nothing of the text.

    sample_ids_B, document_ids_B: int64.  domains, numberings: one a row.
    """

    sample_ids_B: Tensor
    document_ids_B: Tensor
    domains: tuple[str, ...]
    numberings: tuple[Numbering, ...]


class Source(Protocol):
    """Global batches of `size` rows."""

    @property
    def size(self) -> int: ...

    def rows(self, number: int, start: int, stop: int) -> Batch:
        """Rows `start` to `stop - 1` of batch `number` (from 0), on the CPU."""
        ...

    def origins(self, number: int) -> Origins:
        """The origins of batch `number`, without reading a token of the corpus."""
        ...

    def sample_range(self, number: int) -> range:
        """Numbers of the corpus samples in batch `number`."""
        ...


@dataclass(frozen=True)
class CorpusSource:
    """Batches of `size` samples of the training data, in its order."""

    data: TrainingData
    size: int
    numbering: Numbering = "training"

    def rows(self, number: int, start: int, stop: int) -> Batch:
        """Rows of batch `number`."""
        return self.data.batch(self.sample_range(number)[start:stop])

    def origins(self, number: int) -> Origins:
        """The origins of batch `number`."""
        ids = self.sample_range(number)
        documents, domains = self.data.documents_and_domains(ids)
        return Origins(
            sample_ids_B=torch.tensor(ids, dtype=torch.int64),
            document_ids_B=torch.tensor(documents, dtype=torch.int64),
            domains=tuple(domains),
            numberings=(self.numbering,) * len(ids),
        )

    def sample_range(self, number: int) -> range:
        """Numbers of the samples in batch `number`."""
        return range(number * self.size, (number + 1) * self.size)


@dataclass(frozen=True)
class MixedSource:
    """The batches of `corpus`, their last `num_mixed` rows replaced by passages of the target."""

    corpus: Source
    target: ValidationSet
    num_mixed: int

    @property
    def size(self) -> int:
        """Rows of a batch."""
        return self.corpus.size

    def rows(self, number: int, start: int, stop: int) -> Batch:
        """Rows of batch `number`; the target passages come last."""
        first, last = max(0, start - self._border), max(0, stop - self._border)
        if first == last:
            return self.corpus.rows(number, start, stop)
        passages = self.target.batch(number, self.num_mixed).rows(first, last)
        if start >= self._border:
            return passages
        return Batch.concatenate([self.corpus.rows(number, start, self._border), passages])

    def origins(self, number: int) -> Origins:
        """The origins of batch `number`."""
        corpus, kept = self.corpus.origins(number), self._border
        passages = self.target.batch(number, self.num_mixed)
        numbered: list[Numbering] = ["target"] * self.num_mixed
        return Origins(
            sample_ids_B=torch.cat([corpus.sample_ids_B[:kept], passages.sample_ids_B]),
            document_ids_B=torch.cat([corpus.document_ids_B[:kept], passages.document_ids_B]),
            domains=(*corpus.domains[:kept], *passages.domains),
            numberings=(*corpus.numberings[:kept], *numbered),
        )

    def sample_range(self, number: int) -> range:
        """Numbers of the corpus samples whose place batch `number` takes."""
        return self.corpus.sample_range(number)

    @property
    def _border(self) -> int:
        return self.size - self.num_mixed
