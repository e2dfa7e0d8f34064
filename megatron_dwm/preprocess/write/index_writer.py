"""Writes an `.idx` (files/index_format.py) as a stream: no Python object a document.

While a dataset grows, and while several are merged, its documents are a stream of signed lengths
(int32): the length of every sequence, negative if it continues the document of the one before; 0 is
a document without tokens. (Megatron-Core's own builder keeps lists of Python numbers.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_dwm.files.index_format import IndexHeader, TokenType

SignedLengths = Callable[[], Iterator[np.ndarray]]
"""Gives the signed lengths of all documents in order, a block at a time, each time it is called."""


def write_index(path: Path, dtype: TokenType, signed_lengths: SignedLengths) -> IndexHeader:
    """Write the `.idx` of the documents that `signed_lengths` describe, and return its header.

    `signed_lengths` is read four times; memory is one of its blocks.
    """
    num_documents = num_sequences = 0
    for block in signed_lengths():
        num_documents += int(np.count_nonzero(block >= 0))
        num_sequences += int(np.count_nonzero(block))
    header = IndexHeader(dtype=dtype, num_sequences=num_sequences, num_documents=num_documents)
    with path.open("wb") as file:
        file.write(header.packed())
        for block in signed_lengths():
            file.write(_lengths(block).tobytes())
        _write_offsets(file, signed_lengths, header.itemsize)
        _write_borders(file, signed_lengths)
    return header


def tokens_of_documents(signed_lengths: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Number of tokens of every document as int64, a block at a time."""
    unfinished: int | None = None  # tokens of a document that may go on in the next block
    for block in signed_lengths:
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


def _write_offsets(file: BinaryIO, signed_lengths: SignedLengths, itemsize: int) -> None:
    offset = 0
    for block in signed_lengths():
        ends = offset + np.cumsum(_lengths(block), dtype=np.int64) * itemsize
        if len(ends):
            file.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).tobytes())
            offset = int(ends[-1])


def _write_borders(file: BinaryIO, signed_lengths: SignedLengths) -> None:
    """Write the number of sequences before each document, and of all."""
    sequences = 0
    for block in signed_lengths():
        ends = sequences + np.cumsum(block != 0, dtype=np.int64)
        before = ends - (block != 0)
        file.write(before[block >= 0].astype(np.int64).tobytes())
        sequences = int(ends[-1]) if len(ends) else sequences
    file.write(np.int64(sequences).tobytes())
