"""Writes the sidecar of each key (files/sidecar_format.py) from its draft."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_dwm.files.sidecar_format import (
    APPEND_EOD,
    EOD_ID,
    TOKENIZER_KIND,
    TOKENIZER_SHA256,
    TOKENS_AFTER,
    TOKENS_BEFORE,
    VOCAB_SIZE,
    Facts,
    sidecar_schema,
    spell_ids,
    write_row_groups,
)
from megatron_dwm.preprocess.encode.metadata import Kind, arrow_type
from megatron_dwm.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SidecarColumns:
    """What the sidecar of every key has in common."""

    metadata_keys: tuple[str, ...]
    kinds: tuple[Kind, ...]
    source_names: tuple[str, ...]
    """name of each input"""
    facts: Facts
    """what a trainer has to check before it reads the ids"""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the finished file."""
        types = (arrow_type(kind) for kind in self.kinds)
        return sidecar_schema(zip(self.metadata_keys, types, strict=True), self.facts)


def write_sidecar(
    path: Path,
    columns: SidecarColumns,
    drafts: Iterable[pa.RecordBatch],
    tokens_of_documents: Iterable[np.ndarray],
) -> None:
    """Write the sidecar of one key from its documents' draft rows and numbers of tokens.

    A draft row has the index of the input, the record's number and the spelled metadata.
    """
    names = pa.array(columns.source_names, pa.string())
    schema = columns.schema
    tokens = _Numbers(tokens_of_documents)

    def tables() -> Iterator[pa.Table]:
        for draft in drafts:
            source, record, *metadata = draft.columns
            own = [names.take(source), record, pa.array(tokens.take(draft.num_rows))]
            cells = [*own, *metadata]
            yield pa.table(
                [cell.cast(field.type) for cell, field in zip(cells, schema, strict=True)],
                schema=schema,
            )

    write_row_groups(path, schema, tables())
    assert tokens.is_done(), "a document without a row"


class _Numbers:
    """Numbers that arrive in blocks of one size and are taken in blocks of another."""

    def __init__(self, blocks: Iterable[np.ndarray]) -> None:
        self._blocks = iter(blocks)
        self._ready = np.zeros(0, np.int64)

    def take(self, count: int) -> np.ndarray:
        """Return the next `count` numbers as int64."""
        parts = []
        while count > 0:
            if not len(self._ready):
                self._ready = next(self._blocks)
            part, self._ready = self._ready[:count], self._ready[count:]
            parts.append(part)
            count -= len(part)
        return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)

    def is_done(self) -> bool:
        """True if all numbers were taken."""
        return not len(self._ready) and next(self._blocks, None) is None


def facts_of(tokenizer: Tokenizer, *, append_eod: bool) -> dict[str, str]:
    """The facts of ids that this tokenizer makes, as the sidecar records them."""
    return {
        TOKENIZER_KIND: tokenizer.kind,
        TOKENIZER_SHA256: tokenizer.sha256,
        VOCAB_SIZE: str(tokenizer.vocab_size),
        APPEND_EOD: str(append_eod).lower(),
        EOD_ID: str(tokenizer.eod_id),
        TOKENS_BEFORE: spell_ids(tokenizer.around.before),
        TOKENS_AFTER: spell_ids(tokenizer.around.after),
    }
