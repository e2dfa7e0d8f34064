"""The order of training samples: sample k depends only on (data, seed, purpose, k).

It does not depend on the number of samples, the batch size or the layout. So a run that is resumed,
made longer or split over another number of processes reads the same samples.

* One prefix: epoch after epoch of its samples, each shuffled by a hash of (seed, purpose, index of
  the prefix, number of the epoch).
* Several: a blend of their streams (blend.py). With shares by step (`data.schedule`), sample k also
  depends on the steps at which the samples up to k are read.

Cost: rank 0 builds the indices of all epochs once. A sample then costs a binary search per document
and a copy of its tokens from the mapped file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_dwm.config.blend import parse_blend
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.blend import Blend
from megatron_dwm.data.checks import check_length
from megatron_dwm.data.domains import DocumentDomains, read_domains
from megatron_dwm.data.index_cache import (
    Epoch,
    build_epoch,
    on_first_rank,
    open_epoch,
)
from megatron_dwm.data.pieces import (
    ROWS,
    DocumentRules,
    RowPieces,
    clear_border_labels,
    piece_numbers,
)
from megatron_dwm.data.prefixes import IndexedFile, read_indexed_file
from megatron_dwm.data.shares import ReadSteps, shares_of_samples
from megatron_dwm.data.token_losses import TokenLosses
from megatron_dwm.data.values import DocumentValues

_OPEN_EPOCHS = 4


class _PrefixStream:
    """Endless samples of one prefix."""

    def __init__(
        self, file: IndexedFile, config: DataConfig, *, order: str, eod_id: int, cache_dir: Path
    ) -> None:
        check_length(file, config.sequence_length)
        self.file = file
        self.domains: DocumentDomains = read_domains(file, config.domain_key)
        self.samples_per_epoch = file.samples_per_epoch(config.sequence_length)
        self._sequence_length = config.sequence_length
        self._order = order
        self._eod_id = eod_id
        self._cache_dir = cache_dir
        self._indexed = IndexedDataset(file.prefix, mmap=True)
        self._open: dict[int, GPTDataset] = {}
        # The thread of a feed reads ahead while the main thread looks up origins.
        self._opening = Lock()

    def build(self, num_samples: int) -> None:
        """Build the indices of the epochs with the first `num_samples` samples."""
        for number in range(-(-num_samples // self.samples_per_epoch)):
            build_epoch(self._epoch(number), self._indexed, self._eod_id, self._cache_dir)

    def text(self, position: int) -> np.ndarray:
        """Returns int64, the sequence_length + 1 token ids of the sample at `position`."""
        number, index = divmod(position, self.samples_per_epoch)
        sample = self._dataset(number)[index]
        return torch.cat([sample["tokens"], sample["labels"][-1:]]).numpy()

    def pieces(self, position: int) -> RowPieces:
        """Returns the pieces of documents in the sample at `position`; reads no token.

        Documents have their number in the file.
        """
        number, index = divmod(position, self.samples_per_epoch)
        return self._pieces(self._dataset(number), index)

    def label_places(self, position: int) -> np.ndarray:
        """Returns int64 [S], the place in the `.bin` of each label of the sample at `position`."""
        number, index = divmod(position, self.samples_per_epoch)
        sequences, first_offset, last_offset = self._extent(self._dataset(number), index)
        itemsize = np.dtype(self.file.dtype).itemsize
        begins = self._indexed.index.sequence_pointers[sequences] // itemsize
        ends = begins + self._indexed.sequence_lengths[sequences]
        ends[-1] = begins[-1] + last_offset + 1
        begins[0] += first_offset
        runs = [np.arange(a, b) for a, b in zip(begins, ends, strict=True)]
        return np.concatenate(runs)[1:]

    def _epoch(self, number: int) -> Epoch:
        digest = hashlib.sha256(f"{self._order}/{number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")  # numpy.random.RandomState needs 32 bits
        return Epoch(file=self.file, sequence_length=self._sequence_length, seed=seed)

    def _dataset(self, number: int) -> GPTDataset:
        with self._opening:
            if number not in self._open:
                while len(self._open) >= _OPEN_EPOCHS:
                    self._open.pop(next(iter(self._open)))
                self._open[number] = self._opened(number)
            return self._open[number]

    def _opened(self, number: int) -> GPTDataset:
        dataset = open_epoch(self._epoch(number), self._indexed, self._eod_id, self._cache_dir)
        assert len(dataset) == self.samples_per_epoch, (len(dataset), self.samples_per_epoch)
        return dataset

    def _extent(self, dataset: GPTDataset, index: int) -> tuple[np.ndarray, int, int]:
        """Returns a sample's sequences, and the offsets of its first and its last token in them."""
        shuffled = int(dataset.shuffle_index[index])
        first, first_offset = (int(value) for value in dataset.sample_index[shuffled])
        last, last_offset = (int(value) for value in dataset.sample_index[shuffled + 1])
        return np.asarray(dataset.document_index[first : last + 1]), first_offset, last_offset

    def _pieces(self, dataset: GPTDataset, index: int) -> RowPieces:
        sequences, first_offset, last_offset = self._extent(dataset, index)
        lengths = self._indexed.sequence_lengths[sequences].astype(np.int64)
        lengths[-1] = last_offset
        lengths[0] -= first_offset
        # Documents without tokens have no sequence, and a document may have several.
        documents = np.searchsorted(self._indexed.document_indices, sequences, side="right") - 1
        # The last of the sample's S + 1 tokens is the label at `last_offset` of the last sequence.
        of_last_label = documents[-1]
        documents, lengths = documents[lengths > 0], lengths[lengths > 0]
        starts = np.flatnonzero(np.diff(documents, prepend=-1))
        return RowPieces(
            documents=documents[starts],
            lengths=np.add.reduceat(lengths, starts),
            ends_at_border=bool(documents[-1] != of_last_label),
        )


@dataclass(frozen=True)
class UnitOrigins:
    """The origin of each unit: its sample, document and domain, and its number of input tokens."""

    samples: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class TrainingData:
    """The training samples of a run, by number.

    The constructor is a collective call, since rank 0 builds the indices while the others wait.
    Reading is not.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        eod_id: int,
        seed: int,
        num_samples: int,
        cache_dir: Path,
        purpose: str = "training",
        read_at: ReadSteps | None = None,
        rules: DocumentRules = ROWS,
        values: DocumentValues | None = None,
        token_losses: TokenLosses | None = None,
    ) -> None:
        """Open the data and build missing indices in `cache_dir`.

        Args:
            config: the files, the sequence length, the domain column and, optionally, the cache.
            eod_id: the end-of-document token.
            seed: seed of the order.
            num_samples: number of samples that may be read, over all steps and ranks.
            cache_dir: directory of the index cache if `config.cache_dir` is empty.
            purpose: another purpose gives another, independent order of the same data.
            read_at: when samples are read; only `config.schedule` needs it.
            rules: how documents inside a sample are told apart.
            values: those that batches carry; None if the method reads none.
            token_losses: a reference's, which batches carry; None if the method reads none.

        Raises:
            UserError: as `checks.check_data`, or the cache directory cannot be written.
        """
        self.num_samples = num_samples
        self._cache_dir = Path(config.cache_dir) if config.cache_dir else cache_dir
        self._sequence_length = config.sequence_length
        self._rules, self._values, self._token_losses = rules, values, token_losses
        parts = parse_blend(config.train)
        self._streams = [
            _PrefixStream(
                read_indexed_file(part.prefix),
                config,
                order=f"{seed}/{purpose}/{index}",
                eod_id=eod_id,
                cache_dir=self._cache_dir,
            )
            for index, part in enumerate(parts)
        ]
        documents = [stream.file.num_documents for stream in self._streams]
        self._first_document = np.concatenate([[0], np.cumsum(documents)])
        per_epoch = [stream.samples_per_epoch for stream in self._streams]
        shares = shares_of_samples(config, parts, per_epoch, read_at)
        self._blend = Blend(shares, num_samples, self._cache_dir)
        on_first_rank(self._build)

    @property
    def domains(self) -> list[str]:
        """Names of all domains in the data, sorted."""
        return sorted({name for stream in self._streams for name in stream.domains.names})

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        """Returns the samples with these numbers, each below `num_samples`, in this order (CPU)."""
        located = [self._locate(sample_id) for sample_id in sample_ids]
        rows = [self._streams[prefix].text(position) for prefix, position in located]
        text = torch.from_numpy(np.stack(rows))
        tokens_BS = text[:, :-1].contiguous()
        pieces = self._pieces(sample_ids)
        loss_mask_BS = torch.ones(tokens_BS.shape, dtype=torch.float32)
        if not self._rules.border_loss:
            clear_border_labels(loss_mask_BS, pieces)
        origins = self._origins(sample_ids, pieces)
        numbers_BS = piece_numbers(pieces) if self._tells_documents_apart else None
        return Batch(
            tokens_BS=tokens_BS,
            labels_BS=text[:, 1:].contiguous(),
            loss_mask_BS=loss_mask_BS,
            position_ids_BS=torch.arange(tokens_BS.shape[1]).repeat(len(rows), 1),
            sample_ids_B=torch.tensor(list(sample_ids), dtype=torch.int64),
            document_ids_U=torch.tensor(origins.documents, dtype=torch.int64),
            domains=tuple(origins.domains),
            values_U=_unit_values(self._values, self._rules, located, pieces),
            reference_losses_BS=_label_losses(
                self._token_losses, self._streams, located, loss_mask_BS
            ),
            borders_BS=numbers_BS if self._rules.stop_attention else None,
            units_BS=numbers_BS if self._rules.are_units else None,
            equal_shares=self._rules.equal_shares,
            tokens_are_units=self._rules.tokens_are_units,
        )

    def origins(self, sample_ids: Sequence[int]) -> UnitOrigins:
        """Returns the origins of the units of these samples; reads no token.

        Documents are numbered over all prefixes, in the order of `data.train`.
        """
        return self._origins(sample_ids, self._pieces(sample_ids))

    @property
    def _tells_documents_apart(self) -> bool:
        return self._rules.stop_attention or self._rules.are_units

    def _pieces(self, sample_ids: Sequence[int]) -> list[RowPieces]:
        located = [self._locate(sample_id) for sample_id in sample_ids]
        return [self._streams[prefix].pieces(position) for prefix, position in located]

    def _origins(self, sample_ids: Sequence[int], pieces: Sequence[RowPieces]) -> UnitOrigins:
        found = UnitOrigins()
        for sample_id, row in zip(sample_ids, pieces, strict=True):
            prefix, _ = self._locate(sample_id)
            first, domains = int(self._first_document[prefix]), self._streams[prefix].domains
            lengths = row.lengths.tolist() if self._rules.are_units else [int(row.lengths.sum())]
            for document, tokens in zip(row.unit_documents(self._rules), lengths, strict=True):
                found.samples.append(sample_id)
                found.documents.append(first + document)
                found.domains.append(domains.of(document))
                found.tokens.append(tokens)
        return found

    def _locate(self, sample_id: int) -> tuple[int, int]:
        """Returns a sample's prefix, and its position in the stream of that prefix."""
        assert 0 <= sample_id < self.num_samples, (sample_id, self.num_samples)
        return self._blend.locate(sample_id)

    def _build(self) -> None:
        self._blend.build()
        for stream, count in zip(self._streams, self._blend.samples_by_prefix(), strict=True):
            stream.build(count)


_Located = Sequence[tuple[int, int]]
"""the prefix of every sample, and its position in the stream of that prefix"""


def _unit_values(
    values: DocumentValues | None,
    rules: DocumentRules,
    located: _Located,
    pieces: Sequence[RowPieces],
) -> Tensor | None:
    """Returns float32 [n], the values of the units of all samples."""
    if values is None:
        return None
    found = [
        row.unit_values(rules, values.of_prefixes[prefix])
        for (prefix, _), row in zip(located, pieces, strict=True)
    ]
    return torch.from_numpy(np.concatenate(found).astype(np.float32))


def _label_losses(
    losses: TokenLosses | None,
    streams: Sequence[_PrefixStream],
    located: _Located,
    loss_mask_BS: Tensor,
) -> Tensor | None:
    """Returns float32 [B, S], the reference's losses of the labels; 0 where none counts."""
    if losses is None:
        return None
    rows = [
        losses.of_prefixes[prefix][streams[prefix].label_places(position)]
        for prefix, position in located
    ]
    # What does not count may be the first token of a document, which has no loss.
    return torch.from_numpy(np.stack(rows)).where(loss_mask_BS > 0, 0.0)
