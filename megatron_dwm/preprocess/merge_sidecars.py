"""Joins the sidecars of several datasets: checks that they go together, and chooses column types.

Memory is one row group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.sidecar_format import (
    INPUTS_OF_SHARDS,
    facts_in,
    facts_that_differ,
    lacks_end,
    write_row_groups,
)
from megatron_dwm.preprocess.encode.metadata import LARGEST_IN_DOUBLE, spell_float
from megatron_dwm.preprocess.messages import warn


def matching_sidecars(paths: Sequence[Path], num_documents: Sequence[int]) -> list[Path]:
    """The sidecars of all datasets, or none if no dataset has one.

    num_documents: of each path's dataset. Raises `UserError` if some datasets lack their sidecar,
    or if tokenizers, columns or numbers of rows differ, or if one cannot be read.
    """
    there = [path for path in paths if path.exists()]
    if not there:
        return []
    if len(there) < len(paths):
        lacking = next(path for path in paths if not path.exists())
        raise UserError(f"{lacking}: no such file, but {there[0]} exists; give all or none")
    _check_schemas(there)
    for path, expected in zip(there, num_documents, strict=True):
        rows = pq.read_metadata(path).num_rows
        if rows != expected:
            raise UserError(f"{path}: {rows} rows for {expected} documents; it is damaged")
    return there


def read_sidecar_schema(path: Path) -> pa.Schema:
    """The schema of a sidecar. Raises `UserError` if it cannot be read."""
    with _user_error_if_damaged(path):
        return pq.read_schema(path)


@contextmanager
def _user_error_if_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: is not a readable Parquet file ({reason}); preprocess this dataset again"
        ) from None


def _check_schemas(paths: Sequence[Path]) -> None:
    schemas = list(map(read_sidecar_schema, paths))
    first_path, first = paths[0], schemas[0]
    for path, schema in zip(paths, schemas, strict=True):
        differing = facts_that_differ(facts_in(first), facts_in(schema))
        if differing:
            raise UserError(
                f"{path}: another tokenizer, end of document or special tokens than {first_path} "
                f"({', '.join(differing)}); such ids cannot be mixed"
            )
        if schema.names != first.names:
            raise UserError(
                f"{path}: columns {', '.join(schema.names)}, but {first_path} has "
                f"{', '.join(first.names)}"
            )
    unsaid = [str(p) for p, s in zip(paths, schemas, strict=True) if lacks_end(facts_in(s))]
    if unsaid:
        warn(
            f"{', '.join(unsaid)}: the id that ends a document is not recorded (written by an "
            "older version); taken to be that of the others"
        )


def merge_sidecars(paths: Sequence[Path], schema: pa.Schema, output: Path) -> None:
    """Write the rows of all sidecars, in order, to `output`. schema: see `common_schema`."""

    def tables() -> Iterator[pa.Table]:
        for path in paths:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    with _user_error_if_damaged(path):
                        table = file.read_row_group(group)
                    yield _as_schema(table, schema)

    write_row_groups(output, schema, tables())


def _as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    for i, field in enumerate(schema):
        if field.type == pa.string() and pa.types.is_floating(table.field(i).type):
            values = table.column(i).to_pylist()
            spelled = [None if value is None else spell_float(value) for value in values]
            table = table.set_column(i, field.name, pa.array(spelled, pa.string()))
    return table.cast(schema)


def common_schema(paths: Sequence[Path]) -> pa.Schema:
    """Choose column types that hold the values of all, as one run over all inputs would.

    Raises `UserError` for a column whose types have none.
    """
    schemas = list(map(read_sidecar_schema, paths))
    fields = []
    for i, field in enumerate(schemas[0]):
        types = {
            schema.field(i).type
            for schema, path in zip(schemas, paths, strict=True)
            if not _is_all_null(path, i)
        }
        widest = _widest(types)
        if widest is None:
            found = ", ".join(sorted(map(str, types)))
            raise UserError(
                f"{paths[0]}: column {field.name} has values of types that do not go together in "
                f"the datasets ({found}); write it with one type"
            )
        if widest == pa.float64() and any(_beyond_double(path, i) for path in paths):
            widest = pa.string()
        fields.append(pa.field(field.name, widest))
    return pa.schema(fields, metadata=_common_metadata(schemas))


def _common_metadata(schemas: Sequence[pa.Schema]) -> dict[bytes, bytes]:
    """The metadata that all of the schemas have, but for what is true of a shard alone."""
    every = [schema.metadata or {} for schema in schemas]
    common = {name: value for name, value in every[0].items() if all(name in m for m in every)}
    common.pop(INPUTS_OF_SHARDS.encode(), None)
    return common


def _is_all_null(path: Path, column: int) -> bool:
    """True if a column has no value: then its type says nothing."""
    metadata = pq.read_metadata(path)
    nulls = 0
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(column).statistics
        if statistics is None or not statistics.has_null_count:
            return False
        nulls += statistics.null_count
    return nulls == metadata.num_rows


def _beyond_double(path: Path, column: int) -> bool:
    """True if a column of whole numbers has one that a double would round."""
    with pq.ParquetFile(path) as file:
        if not pa.types.is_integer(file.schema_arrow.field(column).type):
            return False
        name = file.schema_arrow.names[column]
        for group in range(file.num_row_groups):
            with _user_error_if_damaged(path):
                table = file.read_row_group(group, columns=[name])
            found = pc.min_max(table.column(0)).as_py()
            if found["min"] is not None and (
                found["min"] < -LARGEST_IN_DOUBLE or found["max"] > LARGEST_IN_DOUBLE
            ):
                return True
    return False


def _widest(types: set[pa.DataType]) -> pa.DataType | None:
    """The type for columns of these types; None if there is none that keeps their values."""
    if len(types) < 2:
        return next(iter(types), pa.string())
    kinds = {_kind(kind) for kind in types}
    if None in kinds:
        return None
    return next(kind for kind in (pa.string(), pa.float64(), pa.int64()) if kind in kinds)


def _kind(found: pa.DataType) -> pa.DataType | None:
    """The type, of those that preprocessing writes, which holds the values of another."""
    if pa.types.is_string(found) or pa.types.is_large_string(found):
        return pa.string()
    if pa.types.is_floating(found):
        return pa.float64()
    return pa.int64() if pa.types.is_integer(found) and found != pa.uint64() else None
