"""Indexed datasets that tools read: their headers, checked, and the lengths of their documents.

Lengths are read in blocks, as a stream of signed lengths (write/index_writer.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.dataset_paths import DatasetPaths
from megatron_dwm.files.index_format import IndexHeader, read_header, read_numbers


@dataclass(frozen=True, kw_only=True)
class IndexedInput:
    """A dataset whose `.bin` has the size that its `.idx` asks for."""

    paths: DatasetPaths
    header: IndexHeader


def prefix_of(name: str) -> str:
    """The prefix that a user means, who may have typed the `.idx` or the `.bin`."""
    for ending in (".idx", ".bin"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


def open_indexed(prefix: str) -> IndexedInput:
    """Read the header of the dataset at `prefix`, and all its lengths for their sum.

    Raises `UserError` if a file is missing or damaged, or if the dataset is multimodal.
    """
    paths = DatasetPaths.of(prefix)
    for path in (paths.idx, paths.bin):
        if not path.is_file():
            raise UserError(f"{path}: no such file; --input takes prefixes, as P_text_document")
    header = _read_header(paths.idx)
    expected = _num_tokens(paths.idx, header) * header.itemsize
    if paths.bin.stat().st_size != expected:
        raise UserError(
            f"{paths.bin}: {paths.bin.stat().st_size} bytes, but its .idx points to {expected}; "
            "it is damaged"
        )
    return IndexedInput(paths=paths, header=header)


def signed_lengths(dataset: IndexedInput) -> Iterator[np.ndarray]:
    """Read the lengths of all documents and sign them by the borders (write/index_writer.py).

    Every block begins with a document and ends with one.
    """
    header, idx = dataset.header, dataset.paths.idx
    with idx.open("rb") as borders_file, idx.open("rb") as lengths_file:
        before = 0
        at = header.borders_at + 8
        for ends in read_numbers(borders_file, at, np.int64, header.num_documents):
            counts = np.diff(ends, prepend=before)
            taken = int(ends[-1]) - before
            at_length = header.lengths_at + 4 * before
            blocks = list(read_numbers(lengths_file, at_length, np.int32, taken))
            lengths = np.concatenate([np.zeros(0, np.int32), *blocks])
            if counts.min() < 0 or (len(lengths) and lengths.min() <= 0):
                raise UserError(f"{idx}: a sequence without tokens; it is damaged")
            starts = np.cumsum(counts) - counts
            signed = -lengths
            signed[starts[counts > 0]] *= -1
            before = int(ends[-1])
            yield np.insert(signed, starts[counts == 0], 0)


def _read_header(idx: Path) -> IndexHeader:
    try:
        header = read_header(idx)
    except ValueError as error:
        raise UserError(str(error)) from None
    if header.has_modes:
        raise UserError(f"{idx}: multimodal (it has a mode of each sequence); only text is read")
    return header


def _num_tokens(idx: Path, header: IndexHeader) -> int:
    with idx.open("rb") as file:
        blocks = read_numbers(file, header.lengths_at, np.int32, header.num_sequences)
        return sum(int(block.sum(dtype=np.int64)) for block in blocks)
