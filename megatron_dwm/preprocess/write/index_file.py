"""Megatron's `.idx`, written and read as a stream: no Python object a document.

    9 bytes  MMIDIDX 0 0       then little-endian:
    uint64 1 (version), uint8 type of the ids, uint64 sequences, uint64 documents + 1,
    int32 length of each sequence, int64 byte offset of each sequence in the `.bin`,
    int64 first sequence of each document, and the number of sequences.

The layout is Megatron-Core's (`megatron/core/datasets/indexed_dataset.py`), whose own builder keeps
lists of Python numbers. A document without tokens has a boundary but no sequence.

While a dataset grows, and while several are merged, its documents are a stream of int32 marks: the
length of every sequence, negative if it goes on with the document of the one before; 0 is a
document without tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_dwm.config.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[type[np.number], int] = {np.uint16: 8, np.int32: 4}
_OTHER_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 5: np.int64, 6: np.float64, 7: np.float32}
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """What an `.idx` says of itself."""

    dtype: type[np.number]
    num_sequences: int
    num_documents: int

    @property
    def lengths_at(self) -> int:
        """Byte at which the lengths begin."""
        return _HEADER.size

    @property
    def pointers_at(self) -> int:
        """Byte at which the offsets begin."""
        return self.lengths_at + 4 * self.num_sequences

    @property
    def documents_at(self) -> int:
        """Byte at which the boundaries of documents begin."""
        return self.pointers_at + 8 * self.num_sequences

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return self.documents_at + 8 * (self.num_documents + 1)

    def packed(self) -> bytes:
        """The bytes before the lengths."""
        code = _CODES[self.dtype]
        return _HEADER.pack(_MAGIC, 1, code, self.num_sequences, self.num_documents + 1)


def read_header(path: Path) -> IndexHeader:
    """Header of `path`; `UserError` if it is no `.idx`, damaged, or has other arrays behind."""
    with path.open("rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise UserError(f"{path}: not an .idx of Megatron's indexed format")
    _, _, code, num_sequences, boundaries = _HEADER.unpack(start)
    types = {**_OTHER_CODES, **{number: dtype for dtype, number in _CODES.items()}}
    if code not in types:
        raise UserError(f"{path}: not an .idx of a known token type")
    header = IndexHeader(
        dtype=types[code], num_sequences=num_sequences, num_documents=boundaries - 1
    )
    if path.stat().st_size != header.size_bytes:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes instead of {header.size_bytes}; it is damaged "
            "or multimodal"
        )
    return header


def read_block(file: BinaryIO, at: int, dtype: type[np.number], count: int) -> Iterator[np.ndarray]:
    """`count` numbers from byte `at` on, some at a time."""
    size = np.dtype(dtype).itemsize
    for first in range(0, count, _BLOCK):
        file.seek(at + first * size)
        taken = min(_BLOCK, count - first)
        yield np.frombuffer(file.read(taken * size), dtype=dtype)


Marks = Callable[[], Iterator[np.ndarray]]
"""The marks of all documents in order, some at a time, as often as asked"""


def write_index(path: Path, dtype: type[np.number], marks: Marks) -> IndexHeader:
    """Write the `.idx` of the documents that `marks` tell.

    Three passes over `marks`, one block in memory.
    """
    num_documents = num_sequences = 0
    for block in marks():
        num_documents += int(np.count_nonzero(block >= 0))
        num_sequences += int(np.count_nonzero(block))
    header = IndexHeader(dtype=dtype, num_sequences=num_sequences, num_documents=num_documents)
    with path.open("wb") as file:
        file.write(header.packed())
        for block in marks():
            file.write(_lengths(block).tobytes())
        _write_pointers(file, marks, np.dtype(dtype).itemsize)
        _write_boundaries(file, marks)
    return header


def tokens_of_documents(marks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Tokens of every document, int64, some at a time."""
    under_way: int | None = None  # of a document that may go on in the next block
    for block in marks:
        starts = np.flatnonzero(block >= 0)
        first = starts[0] if len(starts) else len(block)
        lengths = np.abs(block.astype(np.int64))
        if under_way is not None:
            under_way += int(lengths[:first].sum())
        if len(starts):
            totals = np.add.reduceat(lengths, starts)
            before = [] if under_way is None else [under_way]
            yield np.concatenate([np.array(before, np.int64), totals[:-1]])
            under_way = int(totals[-1])
    if under_way is not None:
        yield np.array([under_way], np.int64)


def _lengths(block: np.ndarray) -> np.ndarray:
    return np.abs(block[block != 0]).astype(np.int32)


def _write_pointers(file: BinaryIO, marks: Marks, itemsize: int) -> None:
    offset = 0
    for block in marks():
        ends = offset + np.cumsum(_lengths(block), dtype=np.int64) * itemsize
        if len(ends):
            file.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes())
            offset = int(ends[-1])


def _write_boundaries(file: BinaryIO, marks: Marks) -> None:
    """The number of sequences before each document, and of all."""
    sequences = 0
    for block in marks():
        ends = sequences + np.cumsum(block != 0, dtype=np.int64)
        before = ends - (block != 0)
        file.write(before[block >= 0].astype(np.int64).tobytes())
        sequences = int(ends[-1]) if len(ends) else sequences
    file.write(np.int64(sequences).tobytes())
