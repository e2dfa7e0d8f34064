"""`P_KEY_document.meta.parquet`: one row a document, in the order of the `.idx`'s documents.

Columns: `source_file` (string, as on the command line), `record` (int64, 0-based position in that
file: the line index for JSON Lines), `tokens` (int64, the end of document included; 0 for an empty
document, which has a row here and a boundary in the `.idx` but no sequence), then one column for
each metadata key under its dotted name. So sequence `i` of the `.idx` is the `i`-th row with
`tokens > 0`, and row `d` is document `d`.

A metadata column is int64 or double if all its values are such numbers, else string; what is
neither string nor null is then spelled as JSON. Only the last row can settle that, so rows go to a
draft file of strings first, and the typed file is made from it. Memory is one row group.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_IN_GROUP = 1 << 16
_INT64_LIMIT = 1 << 63

Kind = Literal["none", "int", "float", "string"]

OWN_COLUMNS = ("source_file", "record", "tokens")


class Sidecar:
    """Writes one sidecar; nothing is at `path` before `finish`."""

    def __init__(self, path: Path, metadata_keys: Sequence[str], facts: dict[str, str]) -> None:
        self._path = path
        self._draft_path = path.with_name(path.name + ".draft")
        self._keys = tuple(metadata_keys)
        self._facts = facts
        self._kinds: list[Kind] = ["none"] * len(self._keys)
        self._columns: list[list[object]] = self._no_rows()
        self._draft = pq.ParquetWriter(
            self._draft_path, self._schema([pa.string()] * len(self._keys))
        )

    def add(self, source_file: str, record: int, tokens: int, metadata: Sequence[object]) -> None:
        """Append the row of one document."""
        row: list[object] = [source_file, record, tokens]
        for i, value in enumerate(metadata):
            kind, spelling = _spell(value)
            self._kinds[i] = _join(self._kinds[i], kind)
            row.append(spelling)
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        if len(self._columns[0]) == _ROWS_IN_GROUP:
            self._flush()

    def finish(self) -> None:
        """Write the typed file."""
        self._flush()
        self._draft.close()
        types = [_arrow_type(kind) for kind in self._kinds]
        schema = self._schema(types)
        with pq.ParquetFile(self._draft_path) as draft, pq.ParquetWriter(self._path, schema) as out:
            for group in range(draft.num_row_groups):
                out.write_table(draft.read_row_group(group).cast(schema))
        self._draft_path.unlink()

    def close(self) -> None:
        """Give up the draft, if it is still there."""
        self._draft.close()
        self._draft_path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._columns[0]:
            self._draft.write_table(pa.table(self._columns, schema=self._draft.schema))
        self._columns = self._no_rows()

    def _no_rows(self) -> list[list[object]]:
        return [[] for _ in range(len(OWN_COLUMNS) + len(self._keys))]

    def _schema(self, metadata_types: Sequence[pa.DataType]) -> pa.Schema:
        own = zip(OWN_COLUMNS, (pa.string(), pa.int64(), pa.int64()), strict=True)
        fields = [*own, *zip(self._keys, metadata_types, strict=True)]
        return pa.schema(fields, metadata=self._facts)


def _spell(value: object) -> tuple[Kind, str | None]:
    """Kind of a JSON value and how a string column holds it."""
    if value is None:
        return "none", None
    if isinstance(value, str):
        # A surrogate without its partner has no UTF-8; Parquet strings are UTF-8.
        return "string", value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return "float", repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return ("int" if -_INT64_LIMIT <= value < _INT64_LIMIT else "string"), str(value)
    return "string", json.dumps(value)


def _join(first: Kind, second: Kind) -> Kind:
    """The narrowest kind that holds both."""
    if first == second or second == "none":
        return first
    if first == "none":
        return second
    return "string" if "string" in (first, second) else "float"


def _arrow_type(kind: Kind) -> pa.DataType:
    return {"int": pa.int64(), "float": pa.float64()}.get(kind, pa.string())
