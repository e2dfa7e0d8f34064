"""Joins indexed datasets into one, in the order given, with their sidecars (merge_sidecars.py).

The kernel copies the `.bin` files (copy_file_range, else sendfile); the `.idx` arrays are copied in
blocks. Memory is one block and one row group, whatever the sizes. The result is what one run over
all inputs writes, byte for byte, if the sidecars' columns have the same types.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import new_outputs, why_unwritable
from megatron_dwm.files.dataset_paths import DatasetPaths
from megatron_dwm.files.index_format import IndexHeader
from megatron_dwm.files.sidecar_format import INPUTS_OF_SHARDS, facts_in
from megatron_dwm.preprocess.merge_sidecars import (
    common_schema,
    matching_sidecars,
    merge_sidecars,
    read_sidecar_schema,
)
from megatron_dwm.preprocess.read.indexed import (
    IndexedInput,
    open_indexed,
    prefix_of,
    signed_lengths,
)
from megatron_dwm.preprocess.write.index_writer import write_index

_COPY_BYTES = 1 << 26
_SHARD_NAME = re.compile(r"^(?P<before>.*)-(?P<shard>\d{5})-of-(?P<shards>\d{5})(?P<after>_.*)$")
_FALL_BACK = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True, kw_only=True)
class MergeSummary:
    """The totals of a merged dataset."""

    documents: int
    """empty ones included"""
    sequences: int
    tokens: int
    has_sidecar: bool


def merge_datasets(
    prefixes: Sequence[str],
    output_prefix: str,
    advance: Callable[[int, int], None] = lambda *_: None,
) -> MergeSummary:
    """Write `output_prefix`.bin, .idx and .meta.parquet from the datasets `prefixes`.

    A prefix may end in `.idx` or `.bin`. `advance` is called with the bytes that were copied and
    with the documents of each dataset. Raises `UserError` for a missing or damaged dataset, one
    named twice, different token types or tokenizers, sidecars of some only, an incomplete set of
    shards, and an output that exists.
    """
    names = [prefix_of(prefix) for prefix in prefixes]
    _check_names(names)
    _check_shards(names)
    parts = [open_indexed(name) for name in names]
    _check_types(parts)
    sidecars = matching_sidecars(
        [part.paths.sidecar for part in parts], [part.header.num_documents for part in parts]
    )
    schema = common_schema(sidecars) if sidecars else None
    target = DatasetPaths.of(output_prefix)
    try:
        with new_outputs([target.sidecar, target.bin, target.idx]) as partials:
            _copy_ids(parts, partials[target.bin], advance)
            if schema is not None:
                merge_sidecars(sidecars, schema, partials[target.sidecar])
            header = _merge_indices(parts, partials[target.idx])
    except OSError as error:
        words = why_unwritable(error)
        if words is None:
            raise
        raise UserError(f"{output_prefix}: the output cannot be written ({words})") from None
    return MergeSummary(
        documents=header.num_documents,
        sequences=header.num_sequences,
        tokens=target.bin.stat().st_size // header.itemsize,
        has_sidecar=bool(sidecars),
    )


def total_bytes(prefixes: Sequence[str]) -> int:
    """Bytes of the `.bin` files that exist."""
    bins = [DatasetPaths.of(prefix_of(prefix)).bin for prefix in prefixes]
    return sum(path.stat().st_size for path in bins if path.is_file())


def _check_names(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        real = os.path.realpath(DatasetPaths.of(name).bin)
        if real in seen:
            also = f", also as {seen[real]}" if seen[real] != name else ""
            raise UserError(
                f"{name}: named twice{also}; its documents would be in the result twice"
            )
        seen[real] = name


def _check_shards(names: Sequence[str]) -> None:
    matches = [found for found in map(_SHARD_NAME.match, names) if found is not None]
    for match in matches:
        others = [
            m for m in matches if _corpus(m) == _corpus(match) and m["shards"] != match["shards"]
        ]
        if others:
            raise UserError(
                f"{match[0]} and {others[0][0]}: the same corpus, divided twice; its documents "
                "would be in the result twice; give the shards of one number"
            )
        family = [m for m in matches if _family(m) == _family(match)]
        shards = [int(m["shard"]) for m in family]
        if shards != list(range(int(match["shards"]))):
            raise UserError(
                f"{match[0]}: one of {int(match['shards'])} shards, of which "
                f"{', '.join(map(str, shards))} are given; give all of them, in order"
            )
        _require_one_list([m[0] for m in family])


def _require_one_list(shards: Sequence[str]) -> None:
    """Raise `UserError` if these shards were not cut from one list of inputs."""
    known: dict[str, str] = {}
    for name in shards:
        sidecar = DatasetPaths.of(name).sidecar
        facts = facts_in(read_sidecar_schema(sidecar)) if sidecar.exists() else {}
        if digest := facts.get(INPUTS_OF_SHARDS):
            known[digest] = name
    if len(known) > 1:
        first, second, *_ = known.values()
        raise UserError(
            f"{first} and {second}: cut from different lists of inputs (a file was added, removed "
            "or changed between them), so documents would be missing or be there twice; "
            "preprocess all shards again"
        )


def _corpus(match: re.Match[str]) -> tuple[str, str]:
    return match["before"], match["after"]


def _family(match: re.Match[str]) -> tuple[str, str, str]:
    return match["before"], match["shards"], match["after"]


def _check_types(parts: Sequence[IndexedInput]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.header.dtype is not first.header.dtype:
            raise UserError(
                f"{part.paths.idx}: tokens of type {part.header.dtype.__name__}, but "
                f"{first.paths.idx} has {first.header.dtype.__name__}; they were made with "
                "different tokenizers"
            )


def _copy_ids(
    parts: Sequence[IndexedInput], output: Path, advance: Callable[[int, int], None]
) -> None:
    with output.open("wb", buffering=0) as target:
        for part in parts:
            with part.paths.bin.open("rb", buffering=0) as source:
                for copied in _copy(source, target):
                    advance(copied, 0)
            advance(0, part.header.num_documents)


def _copy(source: BinaryIO, target: BinaryIO) -> Iterator[int]:
    """Copy all of `source` to the end of `target`; yields the size of each piece."""
    left = os.fstat(source.fileno()).st_size
    copy = _copy_in_kernel
    while left > 0:
        try:
            copied = copy(source, target, min(left, _COPY_BYTES))
        except OSError as error:
            if copy is not _copy_in_kernel or error.errno not in _FALL_BACK:
                raise
            copy = _send  # between file systems, or one that cannot
            continue
        if copied == 0:
            raise UserError(f"{source.name}: became shorter while it was read")
        left -= copied
        yield copied


def _copy_in_kernel(source: BinaryIO, target: BinaryIO, num_bytes: int) -> int:
    return os.copy_file_range(source.fileno(), target.fileno(), num_bytes)


def _send(source: BinaryIO, target: BinaryIO, num_bytes: int) -> int:
    return os.sendfile(target.fileno(), source.fileno(), None, num_bytes)


def _merge_indices(parts: Sequence[IndexedInput], output: Path) -> IndexHeader:
    def all_lengths() -> Iterator[np.ndarray]:
        for part in parts:
            yield from signed_lengths(part)

    return write_index(output, parts[0].header.dtype, all_lengths)
