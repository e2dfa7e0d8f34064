"""Several indexed datasets into one, in the order given, with their sidecars.

The `.bin` files are copied by the kernel (copy_file_range, else sendfile), the `.idx` arrays and
the sidecars in blocks. Memory is one block and one row group, whatever the sizes. The result is
what one run over all inputs writes, byte for byte, if the sidecars' columns have the same types.
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
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import new_outputs
from megatron_dwm.files.dataset_paths import DatasetPaths
from megatron_dwm.files.index_format import IndexHeader, read_header, read_numbers
from megatron_dwm.files.sidecar_format import (
    facts_in,
    facts_that_differ,
    lacks_end,
    write_row_groups,
)
from megatron_dwm.preprocess.encode.metadata import LARGEST_IN_DOUBLE, spell_float
from megatron_dwm.preprocess.messages import warn
from megatron_dwm.preprocess.write.index_writer import write_index

_COPY_BYTES = 1 << 26
_SHARD_NAME = re.compile(r"^(?P<before>.*)-(?P<shard>\d{5})-of-(?P<shards>\d{5})(?P<after>_.*)$")
_FALL_BACK = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True, kw_only=True)
class MergeSummary:
    """What the merged dataset holds."""

    documents: int
    """empty ones too"""
    sequences: int
    tokens: int
    has_sidecar: bool


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One of the datasets to merge."""

    paths: DatasetPaths
    header: IndexHeader


def merge_datasets(
    prefixes: Sequence[str],
    output_prefix: str,
    advance: Callable[[int, int], None] = lambda *_: None,
) -> MergeSummary:
    """Write `output_prefix`.bin, .idx and .meta.parquet from the datasets `prefixes`.

    A prefix may be spelled with the `.idx` or `.bin` at its end. `advance` is told the bytes copied
    and the documents of each. Raises `UserError` for a missing or damaged dataset, one named twice,
    different token types or tokenizers, sidecars of some only, shards that are not all there, and
    an output that exists.
    """
    names = [_stem(prefix) for prefix in prefixes]
    _check_names(names)
    parts = [_open_part(name) for name in names]
    _check_types(parts)
    sidecars = _sidecars(parts)
    target = DatasetPaths.of(output_prefix)
    try:
        with new_outputs([target.sidecar, target.bin, target.idx]) as partials:
            _copy_ids(parts, partials[target.bin], advance)
            if sidecars:
                _merge_sidecars(sidecars, partials[target.sidecar])
            header = _merge_indices(parts, partials[target.idx])
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        words = error.strerror or str(error)
        raise UserError(f"{output_prefix}: the output cannot be written ({words})") from None
    return MergeSummary(
        documents=header.num_documents,
        sequences=header.num_sequences,
        tokens=target.bin.stat().st_size // header.itemsize,
        has_sidecar=bool(sidecars),
    )


def total_bytes(prefixes: Sequence[str]) -> int:
    """Bytes of the `.bin` files that are there."""
    bins = [DatasetPaths.of(_stem(prefix)).bin for prefix in prefixes]
    return sum(path.stat().st_size for path in bins if path.is_file())


def _stem(prefix: str) -> str:
    for ending in (".idx", ".bin"):
        if prefix.endswith(ending):
            return prefix.removesuffix(ending)
    return prefix


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}: named twice; its documents would be in the result twice")
    matches = [found for found in map(_SHARD_NAME.match, names) if found is not None]
    for match in matches:
        family = [m for m in matches if _family(m) == _family(match)]
        shards = [int(m["shard"]) for m in family]
        if shards != list(range(int(match["shards"]))):
            raise UserError(
                f"{match[0]}: one of {int(match['shards'])} shards, of which "
                f"{', '.join(map(str, shards))} are given; give all of them, in order"
            )


def _family(match: re.Match[str]) -> tuple[str, str, str]:
    return match["before"], match["shards"], match["after"]


def _open_part(name: str) -> _Part:
    paths = DatasetPaths.of(name)
    for path in (paths.idx, paths.bin):
        if not path.is_file():
            raise UserError(f"{path}: no such file; --input takes prefixes, as P_text_document")
    header = _read_header(paths.idx)
    expected = _num_tokens(paths.idx, header) * header.itemsize
    if paths.bin.stat().st_size != expected:
        raise UserError(
            f"{paths.bin}: {paths.bin.stat().st_size} bytes, but its .idx speaks of {expected}; "
            "it is damaged"
        )
    return _Part(paths=paths, header=header)


def _read_header(idx: Path) -> IndexHeader:
    try:
        header = read_header(idx)
    except ValueError as error:
        raise UserError(str(error)) from None
    if header.has_modes:
        raise UserError(f"{idx}: multimodal (it has a mode of each sequence); only text is merged")
    return header


def _num_tokens(idx: Path, header: IndexHeader) -> int:
    with idx.open("rb") as file:
        blocks = read_numbers(file, header.lengths_at, np.int32, header.num_sequences)
        return sum(int(block.sum(dtype=np.int64)) for block in blocks)


def _check_types(parts: Sequence[_Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.header.dtype is not first.header.dtype:
            raise UserError(
                f"{part.paths.idx}: tokens of type {part.header.dtype.__name__}, but "
                f"{first.paths.idx} has {first.header.dtype.__name__}; they were made with "
                "different tokenizers"
            )


def _sidecars(parts: Sequence[_Part]) -> list[Path]:
    """The sidecars, of all datasets or of none; `UserError` if they do not go together."""
    there = [part.paths.sidecar for part in parts if part.paths.sidecar.exists()]
    if there and len(there) < len(parts):
        lacking = next(p.paths.sidecar for p in parts if not p.paths.sidecar.exists())
        raise UserError(f"{lacking}: no such file, but {there[0]} exists; give all or none")
    schemas = [pq.read_schema(path) for path in there]
    for path, schema in zip(there, schemas, strict=True):
        differing = facts_that_differ(facts_in(schemas[0]), facts_in(schema))
        if differing:
            raise UserError(
                f"{path}: another tokenizer, end of document or special tokens than {there[0]} "
                f"({', '.join(differing)}); such ids cannot be mixed"
            )
        if schema.names != schemas[0].names:
            raise UserError(
                f"{path}: columns {', '.join(schema.names)}, but {there[0]} has "
                f"{', '.join(schemas[0].names)}"
            )
    unsaid = [str(p) for p, s in zip(there, schemas, strict=True) if lacks_end(facts_in(s))]
    if unsaid:
        warn(
            f"{', '.join(unsaid)}: not said which id ends a document (written by an older "
            "version); taken to be that of the others"
        )
    for part, path in zip(parts, there, strict=False):
        rows = pq.read_metadata(path).num_rows
        if rows != part.header.num_documents:
            raise UserError(
                f"{path}: {rows} rows for {part.header.num_documents} documents; it is damaged"
            )
    return there


def _copy_ids(parts: Sequence[_Part], output: Path, advance: Callable[[int, int], None]) -> None:
    with output.open("wb", buffering=0) as target:
        for part in parts:
            with part.paths.bin.open("rb", buffering=0) as source:
                for copied in _copy(source, target):
                    advance(copied, 0)
            advance(0, part.header.num_documents)


def _copy(source: BinaryIO, target: BinaryIO) -> Iterator[int]:
    """Copy all of `source` to the end of `target`; sizes of the pieces."""
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


def _merge_indices(parts: Sequence[_Part], output: Path) -> IndexHeader:
    def marks() -> Iterator[np.ndarray]:
        for part in parts:
            yield from _marks(part)

    return write_index(output, parts[0].header.dtype, marks)


def _marks(part: _Part) -> Iterator[np.ndarray]:
    """The marks of all documents (index_writer.py): the boundaries say whose a sequence is."""
    header = part.header
    with part.paths.idx.open("rb") as boundaries_file, part.paths.idx.open("rb") as lengths_file:
        before = 0
        at = header.borders_at + 8
        for ends in read_numbers(boundaries_file, at, np.int64, header.num_documents):
            counts = np.diff(ends, prepend=before)
            taken = int(ends[-1]) - before
            at_length = header.lengths_at + 4 * before
            blocks = list(read_numbers(lengths_file, at_length, np.int32, taken))
            lengths = np.concatenate([np.zeros(0, np.int32), *blocks])
            if counts.min() < 0 or (len(lengths) and lengths.min() <= 0):
                raise UserError(f"{part.paths.idx}: a sequence without tokens; it is damaged")
            starts = np.cumsum(counts) - counts
            marks = -lengths
            marks[starts[counts > 0]] *= -1
            before = int(ends[-1])
            yield np.insert(marks, starts[counts == 0], 0)


def _merge_sidecars(paths: Sequence[Path], output: Path) -> None:
    schema = _common_schema(paths)

    def tables() -> Iterator[pa.Table]:
        for path in paths:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    yield _as_schema(file.read_row_group(group), schema)

    write_row_groups(output, schema, tables())


def _as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    for i, field in enumerate(schema):
        if field.type == pa.string() and table.field(i).type == pa.float64():
            values = table.column(i).to_pylist()
            spelled = [None if value is None else spell_float(value) for value in values]
            table = table.set_column(i, field.name, pa.array(spelled, pa.string()))
    return table.cast(schema)


def _common_schema(paths: Sequence[Path]) -> pa.Schema:
    """Column types that hold every part's values, as one run over all would choose them."""
    schemas = [pq.read_schema(path) for path in paths]
    fields = []
    for i, field in enumerate(schemas[0]):
        types = {
            schema.field(i).type
            for schema, path in zip(schemas, paths, strict=True)
            if not _is_all_null(path, i)
        }
        widest = _widest(types)
        if widest == pa.float64() and any(_beyond_double(path, i) for path in paths):
            widest = pa.string()
        fields.append(pa.field(field.name, widest))
    return pa.schema(fields, metadata=_common_metadata(schemas))


def _common_metadata(schemas: Sequence[pa.Schema]) -> dict[bytes, bytes]:
    """What all of the schemas say; they do not contradict each other."""
    every = [schema.metadata or {} for schema in schemas]
    return {name: value for name, value in every[0].items() if all(name in one for one in every)}


def _is_all_null(path: Path, column: int) -> bool:
    """Whether a column of strings has no value: then it says nothing about its type."""
    metadata = pq.read_metadata(path)
    nulls = 0
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(column).statistics
        if statistics is None or not statistics.has_null_count:
            return False
        nulls += statistics.null_count
    return nulls == metadata.num_rows


def _beyond_double(path: Path, column: int) -> bool:
    """Whether a column of whole numbers has one that a double would round."""
    with pq.ParquetFile(path) as file:
        if file.schema_arrow.field(column).type != pa.int64():
            return False
        name = file.schema_arrow.names[column]
        for group in range(file.num_row_groups):
            found = pc.min_max(file.read_row_group(group, columns=[name]).column(0)).as_py()
            if found["min"] is not None and (
                found["min"] < -LARGEST_IN_DOUBLE or found["max"] > LARGEST_IN_DOUBLE
            ):
                return True
    return False


def _widest(types: set[pa.DataType]) -> pa.DataType:
    if pa.string() in types or not types:
        return pa.string()
    return pa.float64() if pa.float64() in types else pa.int64()
