"""The token ids of a dataset's documents, read by any process, some documents at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.selection.pool import Pool
from megatron_dwm.selection.workers import Span


@dataclass(frozen=True, kw_only=True)
class SpanTokens:
    """The ids of consecutive documents, of D documents and their sequences."""

    ids: np.ndarray
    """in the type of the `.bin`, one document after the other"""
    ends_S: np.ndarray
    """int64: where each sequence ends in `ids`"""
    sequences_D: np.ndarray
    """int64: sequences of each document"""

    @property
    def lengths_D(self) -> np.ndarray:
        """int64: tokens of each document."""
        ends = np.concatenate([[0], self.ends_S])[np.cumsum(self.sequences_D)]
        return np.diff(ends, prepend=0)


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """What a process needs to read ids."""

    bin_path: Path
    idx_path: Path
    dtype: type[np.number]
    lengths_at: int
    offsets_at: int
    borders_at: int

    @staticmethod
    def of(pool: Pool) -> TokenSource:
        """The ids of a dataset."""
        header, paths = pool.dataset.header, pool.dataset.paths
        return TokenSource(
            bin_path=paths.bin,
            idx_path=paths.idx,
            dtype=header.dtype,
            lengths_at=header.lengths_at,
            offsets_at=header.offsets_at,
            borders_at=header.borders_at,
        )

    def read(self, span: Span, vocab_size: int, vocabulary: str) -> SpanTokens:
        """Read the documents of `span`.

        vocab_size, vocabulary: number of ids, and what has them, for the message.
        Raises `UserError` for an id that is none of them, and for a file that became shorter.
        """
        borders_E = self._numbers(
            self.idx_path, self.borders_at, np.int64, span.begin, span.end + 1
        )
        begin, end = int(borders_E[0]), int(borders_E[-1])
        sequences_D = np.diff(borders_E)
        if begin == end:
            none = np.zeros(0, np.int64)
            return SpanTokens(ids=none, ends_S=none, sequences_D=sequences_D)
        lengths_S = self._numbers(self.idx_path, self.lengths_at, np.int32, begin, end)
        [offset] = self._numbers(self.idx_path, self.offsets_at, np.int64, begin, begin + 1)
        ends_S = np.cumsum(lengths_S, dtype=np.int64)
        first = int(offset) // np.dtype(self.dtype).itemsize
        ids = self._numbers(self.bin_path, 0, self.dtype, first, first + int(ends_S[-1]))
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise UserError(
                f"{self.bin_path}: has an id outside the vocabulary of {vocabulary} (0 to "
                f"{vocab_size - 1}); give that of the tokenizer that the data was made with"
            )
        return SpanTokens(ids=ids, ends_S=ends_S, sequences_D=sequences_D)

    def _numbers(
        self, path: Path, at: int, dtype: type[np.number], begin: int, end: int
    ) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        with path.open("rb", buffering=0) as file:
            file.seek(at + begin * size)
            content = file.read((end - begin) * size)
        if len(content) < (end - begin) * size:
            raise UserError(f"{path}: became shorter while it was read")
        return np.frombuffer(content, dtype)
