"""Indexed files on disk: finds those that a configuration names, and checks that they are usable.

A prefix of `data.train` (config/blend.py) stands for `PREFIX.bin` (tokens) and `PREFIX.idx`
(files/index_format.py).
Only the header and the last entries of the .idx file are read here, so the cost does not depend on
the size of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.files.dataset_paths import DatasetPaths
from megatron_dwm.files.index_format import (
    IndexHeader,
    TokenType,
    end_of_tokens_bytes,
    read_header,
)

_TOKEN_TYPES = (np.int32, np.int64, np.uint16)


@dataclass(frozen=True, kw_only=True)
class IndexedFile:
    """The header of an indexed file."""

    prefix: str
    dtype: TokenType
    num_sequences: int
    num_documents: int
    num_tokens: int

    @property
    def bin_path(self) -> Path:
        """Path of the token ids."""
        return DatasetPaths.of(self.prefix).bin

    @property
    def idx_path(self) -> Path:
        """Path of the lengths, offsets and document borders."""
        return DatasetPaths.of(self.prefix).idx

    @property
    def sidecar_path(self) -> Path:
        """Path of the documents' metadata, which may not exist."""
        return DatasetPaths.of(self.prefix).sidecar

    def samples_per_epoch(self, sequence_length: int) -> int:
        """Returns the samples of `sequence_length` tokens in an epoch; each needs a token more."""
        return max(0, self.num_tokens - 1) // sequence_length


def read_indexed_file(prefix: str) -> IndexedFile:
    """Read the header of `prefix` and check it against the sizes of both files.

    Raises:
        UserError: a file is missing, is not Megatron's, is cut short, or holds no token ids.
    """
    paths = DatasetPaths.of(prefix)
    for path in (paths.idx, paths.bin):
        if not path.is_file():
            raise UserError(f"data.train: no file {path}{_prefix_hint(prefix)}")
    header = _read_header(paths.idx)
    end_bytes = end_of_tokens_bytes(paths.idx, header)
    if paths.bin.stat().st_size < end_bytes:
        raise UserError(
            f"{paths.bin} has {paths.bin.stat().st_size} bytes but {paths.idx.name} points to "
            f"{end_bytes}: they are not of one run, write both again with "
            f"{name_of_command('preprocess')}"
        )
    return IndexedFile(
        prefix=prefix,
        dtype=header.dtype,
        num_sequences=header.num_sequences,
        num_documents=header.num_documents,
        num_tokens=end_bytes // header.itemsize,
    )


def _read_header(idx: Path) -> IndexHeader:
    try:
        header = read_header(idx)
    except ValueError as error:
        raise UserError(str(error)) from None
    if header.dtype not in _TOKEN_TYPES:
        raise UserError(
            f"{idx} is of type {header.dtype.__name__}: expected token ids "
            f"({', '.join(dtype.__name__ for dtype in _TOKEN_TYPES)})"
        )
    return header


def _prefix_hint(prefix: str) -> str:
    """Returns advice for common mistakes: a file name as prefix, or a missing suffix."""
    stem = prefix.removesuffix(".bin").removesuffix(".idx")
    for candidate in (stem, f"{stem}_text_document"):
        if candidate != prefix and Path(f"{candidate}.idx").is_file():
            return f"; did you mean {candidate}?"
    return ": give the path without .bin or .idx"
