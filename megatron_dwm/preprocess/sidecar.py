"""`P_KEY_document.meta.parquet`: one row a document, in the order of the `.idx`'s documents.

Columns: `source_file` (string, as on the command line), `record` (int64, 0-based position in that
file: the line index for JSON Lines), `tokens` (int64, the end of document included; 0 for an empty
document, which has a row here and a boundary in the `.idx` but no sequence), then one column for
each metadata key under its dotted name. So sequence `i` of the `.idx` is the `i`-th row with
`tokens > 0`, and row `d` is document `d`.

Row groups have 65,536 rows whatever the chunks and interruptions were, so the file's bytes depend
on its content only. Memory is one row group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dwm.preprocess.metadata import Kind, arrow_type

ROWS_IN_GROUP = 1 << 16
OWN_COLUMNS = ("source_file", "record", "tokens")


@dataclass(frozen=True, kw_only=True)
class SidecarColumns:
    """What the sidecar of every key has in common."""

    metadata_keys: tuple[str, ...]
    kinds: tuple[Kind, ...]
    source_names: tuple[str, ...]
    """name of each input"""
    facts: dict[str, str]
    """what a trainer has to check before it reads the ids (schema metadata)"""

    @property
    def schema(self) -> pa.Schema:
        """Of the finished file."""
        own = zip(OWN_COLUMNS, (pa.string(), pa.int64(), pa.int64()), strict=True)
        types = (arrow_type(kind) for kind in self.kinds)
        fields = [*own, *zip(self.metadata_keys, types, strict=True)]
        return pa.schema(fields, metadata=self.facts)


def write_sidecar(
    path: Path,
    columns: SidecarColumns,
    drafts: Iterable[pa.RecordBatch],
    lengths: Iterable[np.ndarray],
) -> None:
    """Write the sidecar of one key from its documents' draft rows and numbers of tokens.

    A draft row is: index of the input, record number, spelled metadata.
    """
    names = pa.array(columns.source_names, pa.string())
    tokens = _Rows(lengths)

    def tables() -> Iterator[pa.Table]:
        for draft in drafts:
            source, record, *metadata = draft.columns
            own = [names.take(source), record, pa.array(tokens.take(draft.num_rows))]
            cells = [*own, *metadata]
            yield pa.table(
                [cell.cast(field.type) for cell, field in zip(cells, columns.schema, strict=True)],
                schema=columns.schema,
            )

    write_groups(path, columns.schema, tables())
    assert tokens.is_done(), "a document without a row"


def write_groups(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write `tables`, rows in order, in row groups of equal size."""
    with pq.ParquetWriter(path, schema) as writer:
        held: list[pa.Table] = []
        num_held = 0
        for table in tables:
            held.append(table)
            num_held += table.num_rows
            while num_held >= ROWS_IN_GROUP:
                joined = pa.concat_tables(held)
                writer.write_table(joined.slice(0, ROWS_IN_GROUP).combine_chunks())
                held = [joined.slice(ROWS_IN_GROUP)]
                num_held -= ROWS_IN_GROUP
        if num_held:
            writer.write_table(pa.concat_tables(held).combine_chunks())


class _Rows:
    """Numbers that come in blocks of one size and are taken in another."""

    def __init__(self, blocks: Iterable[np.ndarray]) -> None:
        self._blocks = iter(blocks)
        self._ready = np.zeros(0, np.int32)

    def take(self, count: int) -> np.ndarray:
        """The next `count` as int64."""
        parts = []
        while count > 0:
            if not len(self._ready):
                self._ready = next(self._blocks)
            part, self._ready = self._ready[:count], self._ready[count:]
            parts.append(part)
            count -= len(part)
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

    def is_done(self) -> bool:
        """Whether all numbers were taken."""
        return not len(self._ready) and next(self._blocks, None) is None


def facts_of(kind: str, sha256: str, vocab_size: int, *, append_eod: bool) -> dict[str, str]:
    """Which tokenizer made the ids, as the schema's metadata."""
    return {
        "tokenizer_kind": kind,
        "tokenizer_sha256": sha256,
        "vocab_size": str(vocab_size),
        "append_eod": str(append_eod).lower(),
    }


def facts_in(schema: pa.Schema, names: Sequence[str]) -> dict[str, str]:
    """The facts of these names that a sidecar's schema holds."""
    found = schema.metadata or {}
    return {name: found.get(name.encode(), b"").decode() for name in names}
