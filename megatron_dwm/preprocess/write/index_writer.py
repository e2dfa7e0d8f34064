"""Writes an `.idx` (files/index_format.py) as a stream: no Python object a document.

While a dataset grows, and while several are merged, its documents are a stream of int32 marks: the
length of every sequence, negative if it goes on with the document of the one before; 0 is a
document without tokens. (Megatron-Core's own builder keeps lists of Python numbers.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_dwm.files.index_format import IndexHeader, TokenType

Marks = Callable[[], Iterator[np.ndarray]]
"""The marks of all documents in order, some at a time, as often as asked"""


def write_index(path: Path, dtype: TokenType, marks: Marks) -> IndexHeader:
    """Write the `.idx` of the documents that `marks` describe, and return its header.

    `marks` is read four times; memory is one of its blocks.
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
        _write_offsets(file, marks, header.itemsize)
        _write_borders(file, marks)
    return header


def tokens_of_documents(marks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Number of tokens of every document as int64, a block at a time."""
    unfinished: int | None = None  # tokens of a document that may go on in the next block
    for block in marks:
        starts = np.flatnonzero(block >= 0)
        first = starts[0] if len(starts) else len(block)
        lengths = np.abs(block.astype(np.int64))
        if unfinished is not None:
            unfinished += int(lengths[:first].sum())
        if len(starts):
            totals = np.add.reduceat(lengths, starts)
            before = [] if unfinished is None else [unfinished]
            yield np.concatenate([np.array(before, np.int64), totals[:-1]])
            unfinished = int(totals[-1])
    if unfinished is not None:
        yield np.array([unfinished], np.int64)


def _lengths(block: np.ndarray) -> np.ndarray:
    return np.abs(block[block != 0]).astype(np.int32)


def _write_offsets(file: BinaryIO, marks: Marks, itemsize: int) -> None:
    offset = 0
    for block in marks():
        ends = offset + np.cumsum(_lengths(block), dtype=np.int64) * itemsize
        if len(ends):
            file.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes())
            offset = int(ends[-1])


def _write_borders(file: BinaryIO, marks: Marks) -> None:
    """Write the number of sequences before each document, and of all."""
    sequences = 0
    for block in marks():
        ends = sequences + np.cumsum(block != 0, dtype=np.int64)
        before = ends - (block != 0)
        file.write(before[block >= 0].astype(np.int64).tobytes())
        sequences = int(ends[-1]) if len(ends) else sequences
    file.write(np.int64(sequences).tobytes())
