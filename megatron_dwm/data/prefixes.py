"""Indexed files on disk: which ones a configuration names, and whether they can be used.

`data.train` is a list of prefixes, or weights and prefixes in turn, as Megatron's `--data-path`.
A prefix stands for `PREFIX.bin` (tokens) and `PREFIX.idx`. The layout of the latter is that of
Megatron-Core's `_IndexWriter` (megatron/core/datasets/indexed_dataset.py). Only its header and
last entries are read here, so a check costs the same for any size of data.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dwm.config.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_DTYPES = {4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True, kw_only=True)
class BlendPart:
    """One prefix of `data.train` and its share."""

    prefix: str
    weight: float | None
    """None when the configuration names no weights: the share then follows the size"""


@dataclass(frozen=True, kw_only=True)
class IndexedFile:
    """What the header of an indexed file says."""

    prefix: str
    dtype: type[np.generic]
    num_sequences: int
    num_documents: int
    num_tokens: int

    @property
    def bin_path(self) -> Path:
        """The tokens."""
        return Path(f"{self.prefix}.bin")

    @property
    def idx_path(self) -> Path:
        """Lengths, offsets and document borders."""
        return Path(f"{self.prefix}.idx")

    def samples_per_epoch(self, sequence_length: int) -> int:
        """Samples of `sequence_length` tokens in one pass, each with one token to predict after."""
        return max(0, self.num_tokens - 1) // sequence_length


def parse_blend(train: Sequence[str]) -> list[BlendPart]:
    """The parts of `data.train`, in order.

    Raises:
        UserError: the list is empty, weights and prefixes do not alternate, a weight is not a
            positive number, or a prefix is named twice.
    """
    entries = [str(entry) for entry in train]
    if not entries:
        raise UserError("data.train is empty: name at least one prefix of PREFIX.bin/PREFIX.idx")
    weighted = any(_number(entry) is not None for entry in entries)
    parts = _weighted(entries) if weighted else [BlendPart(prefix=e, weight=None) for e in entries]
    prefixes = [part.prefix for part in parts]
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise UserError(f"data.train names {prefix} twice: name it once, with a larger weight")
    return parts


def _weighted(entries: list[str]) -> list[BlendPart]:
    expected = "expected weights and prefixes in turn (0.3 A 0.7 B), or prefixes alone"
    if len(entries) % 2 == 1:
        raise UserError(
            f"data.train has {len(entries)} entries with weights among them: {expected}"
        )
    parts = []
    for weight_text, prefix in zip(entries[::2], entries[1::2], strict=True):
        weight = _number(weight_text)
        if weight is None or _number(prefix) is not None:
            raise UserError(f"data.train has '{weight_text} {prefix}' as a pair: {expected}")
        if not (weight > 0 and np.isfinite(weight)):
            raise UserError(f"data.train gives {prefix} the weight {weight_text}: must be above 0")
        parts.append(BlendPart(prefix=prefix, weight=weight))
    return parts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_indexed_file(prefix: str) -> IndexedFile:
    """The header of `prefix`, checked against the sizes of both files.

    Raises:
        UserError: a file is missing, is not Megatron's, is cut short, or holds no token ids.
    """
    idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise UserError(f"data.train: no file {path}{_prefix_hint(prefix)}")
    with idx_path.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise UserError(f"{idx_path} is not a Megatron index: write it with preprocess_data.py")
    _, version, code, num_sequences, num_borders = _HEADER.unpack(head)
    if version != 1 or code not in _TOKEN_DTYPES:
        raise UserError(
            f"{idx_path} has version {version} and type code {code}: "
            "expected version 1 and token ids (4 int32, 5 int64, 8 uint16)"
        )
    expected_bytes = _HEADER.size + 12 * num_sequences + 8 * num_borders
    if idx_path.stat().st_size not in (expected_bytes, expected_bytes + num_sequences):
        raise UserError(
            f"{idx_path} has {idx_path.stat().st_size} bytes but its header asks for "
            f"{expected_bytes}: it was cut short, write it again with preprocess_data.py"
        )
    dtype = _TOKEN_DTYPES[code]
    end_bytes = _end_of_tokens_bytes(idx_path, num_sequences, np.dtype(dtype).itemsize)
    if bin_path.stat().st_size < end_bytes:
        raise UserError(
            f"{bin_path} has {bin_path.stat().st_size} bytes but {idx_path.name} points to "
            f"{end_bytes}: they are not of one run, write both again with preprocess_data.py"
        )
    return IndexedFile(
        prefix=prefix,
        dtype=dtype,
        num_sequences=num_sequences,
        num_documents=max(0, num_borders - 1),
        num_tokens=end_bytes // np.dtype(dtype).itemsize,
    )


def _end_of_tokens_bytes(idx_path: Path, num_sequences: int, itemsize: int) -> int:
    """Bytes up to the end of the last sequence, from the last length and the last offset."""
    if num_sequences == 0:
        return 0
    with idx_path.open("rb") as stream:
        stream.seek(_HEADER.size + 4 * (num_sequences - 1))
        (length_tokens,) = struct.unpack("<i", stream.read(4))
        stream.seek(_HEADER.size + 4 * num_sequences + 8 * (num_sequences - 1))
        (offset_bytes,) = struct.unpack("<q", stream.read(8))
    return offset_bytes + length_tokens * itemsize


def _prefix_hint(prefix: str) -> str:
    """Advice for the usual slips: a file name instead of its prefix, or the suffix left out."""
    stem = prefix.removesuffix(".bin").removesuffix(".idx")
    for candidate in (stem, f"{stem}_text_document"):
        if candidate != prefix and Path(f"{candidate}.idx").is_file():
            return f"; did you mean {candidate}?"
    return ": give the path without .bin or .idx"
