"""Indexed files on disk: finds those that a configuration names, and checks that they are usable.

`data.train` is a list of prefixes, or `weight prefix weight prefix ...`, as Megatron's
`--data-path`. A prefix that is named twice is one part of the blend with the sum of the shares, so
that none of its samples is read again before all were read; Megatron would read the same samples
for both. A prefix stands for `PREFIX.bin` (tokens) and `PREFIX.idx` (files/index_format.py).
Only the header and the last entries of the .idx file are read here, so the cost does not depend on
the size of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
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
class BlendPart:
    """One prefix of `data.train` and its share."""

    prefix: str
    weight: float | None
    """None if `data.train` has no weights; the share is then in proportion to the size"""
    places: tuple[int, ...]
    """where the list of prefixes names it, from 0; several if it does so more than once"""


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


def parse_blend(train: Sequence[str | float]) -> list[BlendPart]:
    """Returns the parts of `data.train`, in order, one for each prefix, however it is spelled.

    Raises:
        UserError: the list is empty, weights and prefixes do not alternate, or a weight is not a
            positive number.
    """
    entries = [str(entry) for entry in train]
    if not entries:
        raise UserError("data.train is empty: name at least one prefix of PREFIX.bin/PREFIX.idx")
    weighted = any(_number(entry) is not None for entry in entries)
    named = _weighted(entries) if weighted else [(prefix, None) for prefix in entries]
    places: dict[Path, list[int]] = {}
    for place, (prefix, _) in enumerate(named):
        places.setdefault(Path(prefix).resolve(), []).append(place)
    return [
        BlendPart(
            prefix=named[found[0]][0],
            weight=sum(named[place][1] or 0.0 for place in found) if weighted else None,
            places=tuple(found),
        )
        for found in places.values()
    ]


def _weighted(entries: list[str]) -> list[tuple[str, float | None]]:
    """Returns every prefix with its weight."""
    expected = "expected weights and prefixes in turn (0.3 A 0.7 B), or prefixes alone"
    if len(entries) % 2 == 1:
        raise UserError(
            f"data.train has {len(entries)} entries with weights among them: {expected}"
        )
    parts: list[tuple[str, float | None]] = []
    for weight_text, prefix in zip(entries[::2], entries[1::2], strict=True):
        weight = _number(weight_text)
        if weight is None or _number(prefix) is not None:
            raise UserError(f"data.train has '{weight_text} {prefix}' as a pair: {expected}")
        if not (weight > 0 and np.isfinite(weight)):
            raise UserError(f"data.train gives {prefix} the weight {weight_text}: must be above 0")
        parts.append((prefix, weight))
    return parts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


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
