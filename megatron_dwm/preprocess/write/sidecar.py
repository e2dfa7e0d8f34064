"""`P_KEY_document.meta.parquet`: one row a document, in the order of the `.idx`'s documents.

Columns: `source_file` (string, as on the command line), `record` (int64, 0-based position in that
file: the line index for JSON Lines), `tokens` (int64, the end of document included; 0 for an empty
document, which has a row here and a boundary in the `.idx` but no sequence), then one column for
each metadata key under its dotted name. So row `d` is document `d`, and where no text is a list of
sequences, sequence `i` of the `.idx` is the `i`-th row with `tokens > 0`.

Row groups have 65,536 rows whatever the chunks and interruptions were, so the file's bytes depend
on its content only. Memory is one row group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dwm.preprocess.encode.metadata import Kind, arrow_type
from megatron_dwm.tokenizer import Tokenizer

ROWS_IN_GROUP = 1 << 16
_END = b"eod_id"
_OLDER = {b"special_tokens_before": b"", b"special_tokens_after": b""}
Facts = Mapping[bytes, bytes]
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
    tokens_of_documents: Iterable[np.ndarray],
) -> None:
    """Write the sidecar of one key from its documents' draft rows and numbers of tokens.

    A draft row is: index of the input, record number, spelled metadata.
    """
    names = pa.array(columns.source_names, pa.string())
    tokens = _Rows(tokens_of_documents)

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
        self._ready = np.zeros(0, np.int64)

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


def facts_of(tokenizer: Tokenizer, *, append_eod: bool) -> dict[str, str]:
    """What made the ids, as the schema's metadata: training and merging compare it."""
    return {
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": str(tokenizer.vocab_size),
        "append_eod": str(append_eod).lower(),
        "eod_id": str(tokenizer.eod_id),
        "special_tokens_before": " ".join(map(str, tokenizer.around.before)),
        "special_tokens_after": " ".join(map(str, tokenizer.around.after)),
    }


def facts_that_differ(first: Facts, second: Facts) -> list[str]:
    """Names of the facts in which two schemas' metadata differ.

    Older versions put no special tokens around texts and did not say so; an end-of-document id that
    is not recorded may be any.
    """
    before, after = ({**_OLDER, **facts} if facts else facts for facts in (first, second))
    names = sorted({*before, *after})
    differing = [name for name in names if before.get(name) != after.get(name)]
    both_have_end = _END in before and _END in after
    return [n.decode() for n in differing if n != _END or both_have_end or not (before and after)]


def common_facts(schemas: Sequence[pa.Schema]) -> dict[bytes, bytes]:
    """What all of the schemas say, which do not differ."""
    facts = [schema.metadata or {} for schema in schemas]
    return {name: value for name, value in facts[0].items() if all(name in f for f in facts)}


def lacks_end(facts: Facts) -> bool:
    """Whether neither the facts nor the tokenizer's file say which id ends a document."""
    return facts.get(b"tokenizer_kind") == b"HuggingFaceTokenizer" and _END not in facts
