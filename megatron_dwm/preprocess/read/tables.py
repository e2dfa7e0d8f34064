"""Parquet and Arrow files as chunks of rows.

Only the columns that are asked for are read. Memory is one row group's pages of them (Parquet) or
one record batch (Arrow, mapped, not loaded). A row group or batch larger than a chunk is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.records import Chunk, Position

_PARQUET_ROWS = 2048
_ARROW_MAGIC = b"ARROW1"
TABLE_SUFFIXES = (".parquet", ".arrow")


@dataclass(frozen=True, kw_only=True)
class TableRows:
    """The rows of a table that are left to read."""

    tables: Iterator[pa.Table]
    """these rows, some at a time"""
    total_rows: int
    """rows of the whole table; 1 if it is not known"""


def read_table_file(
    path: Path, name: str, start: Position, *, columns: Sequence[str], chunk_bytes: int
) -> Iterator[Chunk]:
    """Chunks of the rows of `path` from row `start.offset` on.

    Raises `UserError` for a file that is not of the format that its ending names, or is damaged.
    """
    open_rows = _parquet_rows if path.suffix == ".parquet" else _arrow_rows
    size_bytes = path.stat().st_size
    try:
        rows = open_rows(path, columns, start.offset)
        yield from table_chunks(rows, name, start, size_bytes=size_bytes, chunk_bytes=chunk_bytes)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        complaint = " ".join(str(error).split())
        raise UserError(
            f"{path}: damaged, or no {path.suffix[1:]} file ({complaint}); fetch it again"
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise  # the disk, not the content
        complaint = " ".join(str(error).split())
        raise UserError(f"{path}: damaged ({complaint}); fetch it again") from None


def table_chunks(
    rows: TableRows,
    name: str,
    start: Position,
    *,
    size_bytes: int,
    chunk_bytes: int,
) -> Iterator[Chunk]:
    """Cut rows into chunks; the first row is that of `start`. size_bytes: of the whole table."""
    row = start.offset
    for table in rows.tables:
        for part in _cut(table, chunk_bytes):
            first, row = row, row + part.num_rows
            yield Chunk(
                source=start.input,
                source_file=name,
                content=part,
                first_record=first,
                end=Position(input=start.input, offset=row, record=row),
                consumed_bytes=size_bytes * part.num_rows // max(rows.total_rows, 1),
            )


def _cut(table: pa.Table, chunk_bytes: int) -> Iterator[pa.Table]:
    """Cut a table into slices of about `chunk_bytes`."""
    bytes_a_row = max(1, table.nbytes // max(1, table.num_rows))
    rows = max(1, chunk_bytes // bytes_a_row)
    for first in range(0, table.num_rows, rows):
        yield table.slice(first, rows)


def _parquet_rows(path: Path, columns: Sequence[str], start_row: int) -> TableRows:
    file = pq.ParquetFile(path, pre_buffer=False)
    wanted = [name for name in columns if name in file.schema_arrow.names]

    def tables() -> Iterator[pa.Table]:
        first = 0
        with file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows > start_row:
                    yield from _rows_of_group(file, group, wanted, max(0, start_row - first))
                first += rows

    return TableRows(tables=tables(), total_rows=file.metadata.num_rows)


def _rows_of_group(
    file: pq.ParquetFile, group: int, columns: Sequence[str], skip: int
) -> Iterator[pa.Table]:
    num_rows = file.metadata.row_group(group).num_rows
    if not columns:  # then every row lacks everything, but it is a row
        yield _rows_without_columns(num_rows - skip)
        return
    for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=list(columns)):
        left = batch.slice(skip)
        skip = max(0, skip - batch.num_rows)
        if left.num_rows:
            yield pa.Table.from_batches([left])


def _arrow_rows(path: Path, columns: Sequence[str], start_row: int) -> TableRows:
    """Read both forms: the file format, and the stream that the `datasets` library caches."""
    source = pa.memory_map(str(path))
    is_file_format = source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
    source.seek(0)
    if is_file_format:
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        total_rows = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
    else:
        total_rows = sum(batch.num_rows for batch in pa.ipc.open_stream(source))
        source.seek(0)
        batches = iter(pa.ipc.open_stream(source))

    def tables() -> Iterator[pa.Table]:
        first = 0
        with source:
            for batch in batches:
                left = batch.slice(max(0, start_row - first))
                first += batch.num_rows
                if left.num_rows:
                    yield _select(left, columns)

    return TableRows(tables=tables(), total_rows=total_rows)


def _select(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.Table:
    wanted = [name for name in columns if name in batch.schema.names]
    if not wanted:
        return _rows_without_columns(batch.num_rows)
    return pa.Table.from_batches([batch]).select(wanted)


def _rows_without_columns(num_rows: int) -> pa.Table:
    """Make rows that lack every key; their only column is never read."""
    return pa.table({"": pa.nulls(num_rows)})
