"""Megatron's `.idx`: where the sequences and documents of a `.bin` begin and end.

    9 bytes  MMIDIDX 0 0       then little-endian:
    uint64 1 (version), uint8 type of the ids, uint64 sequences, uint64 documents + 1,
    int32 length of each sequence, int64 byte offset of each sequence in the `.bin`,
    int64 first sequence of each document, and the number of sequences;
    a multimodal dataset ends with an int8 mode of each sequence.

The layout is Megatron-Core's (`_IndexWriter` in `megatron/core/datasets/indexed_dataset.py`). A
document without tokens has a border but no sequence. Reading the header and the end of the tokens
costs the same for any size of data.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_dwm.files.command_names import name_of_command

TokenType = type[np.number]
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_LENGTH, _OFFSET = struct.Struct("<i"), struct.Struct("<q")
_TYPES: dict[int, TokenType] = {
    **{1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64},
    **{6: np.float64, 7: np.float32, 8: np.uint16},
}
_CODES = {dtype: code for code, dtype in _TYPES.items()}
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """What an `.idx` says of itself."""

    dtype: TokenType
    """type of the ids in the `.bin`"""
    num_sequences: int
    num_documents: int
    has_modes: bool = False
    """True if a mode of each sequence follows the borders"""

    @property
    def lengths_at(self) -> int:
        """Byte at which the lengths begin."""
        return _HEADER.size

    @property
    def offsets_at(self) -> int:
        """Byte at which the offsets begin."""
        return self.lengths_at + _LENGTH.size * self.num_sequences

    @property
    def borders_at(self) -> int:
        """Byte at which the borders of documents begin."""
        return self.offsets_at + _OFFSET.size * self.num_sequences

    @property
    def itemsize(self) -> int:
        """Bytes of one id."""
        return np.dtype(self.dtype).itemsize

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        modes = self.num_sequences if self.has_modes else 0
        return self.borders_at + 8 * (self.num_documents + 1) + modes

    def packed(self) -> bytes:
        """The bytes before the lengths."""
        code = _CODES[self.dtype]
        return _HEADER.pack(_MAGIC, _VERSION, code, self.num_sequences, self.num_documents + 1)


def read_header(path: Path) -> IndexHeader:
    """Read the header of an `.idx` and check it against the size of the file.

    Raises ValueError, a line that names `path`, if it is no `.idx` of this version, of an unknown
    type, or of another size than its header asks for.
    """
    with path.open("rb") as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise ValueError(
            f"{path} is not a Megatron index: write it with {name_of_command('preprocess')}"
        )
    _, version, code, num_sequences, num_borders = _HEADER.unpack(start)
    if version != _VERSION or code not in _TYPES:
        raise ValueError(
            f"{path} has version {version} and type code {code}: expected version {_VERSION} and "
            f"a type code from {min(_TYPES)} to {max(_TYPES)}"
        )
    header, with_modes = (
        IndexHeader(
            dtype=_TYPES[code],
            num_sequences=num_sequences,
            num_documents=max(0, num_borders - 1),
            has_modes=has_modes,
        )
        for has_modes in (False, True)
    )
    size_bytes = path.stat().st_size
    if size_bytes == header.size_bytes:
        return header
    if size_bytes == with_modes.size_bytes:
        return with_modes
    raise ValueError(
        f"{path} has {size_bytes} bytes but its header asks for {header.size_bytes}: it was "
        f"cut short or is damaged, write it again with {name_of_command('preprocess')}"
    )


def read_numbers(file: BinaryIO, at: int, dtype: TokenType, count: int) -> Iterator[np.ndarray]:
    """Read `count` numbers from byte `at` on, a block at a time."""
    size = np.dtype(dtype).itemsize
    for first in range(0, count, _BLOCK):
        file.seek(at + first * size)
        taken = min(_BLOCK, count - first)
        yield np.frombuffer(file.read(taken * size), dtype=dtype)


def end_of_tokens_bytes(path: Path, header: IndexHeader) -> int:
    """Bytes of the `.bin` up to the end of the last sequence, from its length and its offset."""
    if header.num_sequences == 0:
        return 0
    last = header.num_sequences - 1
    with path.open("rb") as file:
        file.seek(header.lengths_at + _LENGTH.size * last)
        (length_tokens,) = _LENGTH.unpack(file.read(_LENGTH.size))
        file.seek(header.offsets_at + _OFFSET.size * last)
        (offset_bytes,) = _OFFSET.unpack(file.read(_OFFSET.size))
    return offset_bytes + length_tokens * header.itemsize
