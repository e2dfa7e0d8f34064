"""Copies chosen documents of a dataset into a new one: tokens, index and rows of the sidecar.

The `.bin` is read in windows of 16 MB, in order, and each run of consecutive documents is one write
into a large buffer: the cost is that of copying the file, plus about a microsecond for each run.
Windows without a chosen document are not read. The `.idx` is written as a stream. Memory is a
window, a block of the index, a row group of the sidecar, and some bytes a document.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.sidecar_format import write_row_groups
from megatron_dwm.preprocess.read.indexed import signed_lengths
from megatron_dwm.preprocess.write.index_writer import write_index
from megatron_dwm.selection.pool import Pool

_WINDOW_BYTES = 1 << 24
_BUFFER_BYTES = 1 << 23

Advance = Callable[[int, int], None]
"""Called with bytes of the input that are done, and with documents."""


def copy_tokens(pool: Pool, chosen_D: np.ndarray, output: Path, advance: Advance) -> None:
    """Write the `.bin` of the chosen documents."""
    first_R, last_R = _runs(chosen_D)
    ends_D = np.cumsum(pool.tokens_D) * pool.dataset.header.itemsize
    begin_R = (ends_D - pool.tokens_D * pool.dataset.header.itemsize)[first_R]
    end_R = ends_D[last_R]
    del ends_D
    with (
        pool.dataset.paths.bin.open("rb", buffering=0) as source,
        output.open("wb", buffering=_BUFFER_BYTES) as target,
    ):
        size_bytes = os.fstat(source.fileno()).st_size
        # One window for all reads: fresh memory for each would cost more than the copy.
        window = memoryview(bytearray(min(_WINDOW_BYTES, size_bytes)))
        for at in range(0, size_bytes, _WINDOW_BYTES):
            stop = min(at + _WINDOW_BYTES, size_bytes)
            runs = slice(np.searchsorted(end_R, at, "right"), np.searchsorted(begin_R, stop))
            begins, ends = np.maximum(begin_R[runs], at), np.minimum(end_R[runs], stop)
            _copy_window(source, target, begins, ends, window)
            advance(stop - at, 0)
    advance(0, int(np.count_nonzero(chosen_D)))


def copy_index(pool: Pool, chosen_D: np.ndarray, output: Path) -> None:
    """Write the `.idx` of the chosen documents."""

    def chosen_lengths() -> Iterator[np.ndarray]:
        document = 0
        for block in signed_lengths(pool.dataset):
            begins = block >= 0
            numbers = document + np.cumsum(begins) - 1
            document += int(np.count_nonzero(begins))
            yield block[chosen_D[numbers]]

    write_index(output, pool.dataset.header.dtype, chosen_lengths)


def copy_rows(pool: Pool, chosen_D: np.ndarray, output: Path) -> None:
    """Write the sidecar of the chosen documents: all columns, and the facts."""
    sidecar = pool.sidecar
    assert sidecar is not None

    def tables() -> Iterator[pa.Table]:
        row = 0
        for group in range(sidecar.num_row_groups):
            table = sidecar.read_row_group(group)
            yield table.filter(pa.array(chosen_D[row : row + table.num_rows]))
            row += table.num_rows

    write_row_groups(output, sidecar.schema_arrow, tables())


def _runs(chosen_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last document of each run of consecutive chosen ones."""
    padded = np.concatenate([[False], chosen_D, [False]]).view(np.int8)
    steps = np.diff(padded)
    return np.flatnonzero(steps == 1), np.flatnonzero(steps == -1) - 1


def _copy_window(
    source: BinaryIO, target: BinaryIO, begins: np.ndarray, ends: np.ndarray, window: memoryview
) -> None:
    """Copy byte ranges, which are in order and fit into `window`, with one read."""
    if not len(begins):
        return
    base = int(begins[0])
    wanted = int(ends[-1]) - base
    content = window[:wanted]
    if os.preadv(source.fileno(), [content], base) < wanted:
        raise UserError(f"{source.name}: became shorter while it was read")
    for begin, end in zip((begins - base).tolist(), (ends - base).tolist(), strict=True):
        target.write(content[begin:end])
