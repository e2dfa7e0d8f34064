"""A chunk of records to token ids and sidecar rows: the work that runs in parallel.

Follows Megatron-LM's `tools/preprocess_data.py`, class Encoder: the ids of the text, then the end
of document if asked for and only if there are ids. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from megatron_dwm.preprocess.documents import DocumentSettings, documents_of
from megatron_dwm.preprocess.metadata import spell_column
from megatron_dwm.preprocess.records import Chunk, EncodedChunk, EncodedKey
from megatron_dwm.tokenizer import Engine

_FIRST_VOCABULARY_OF_INT32 = 65500


class LostRecords(RuntimeError):
    """The counts do not add up: a fault of this program, never of the input."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """How documents become ids."""

    documents: DocumentSettings
    dtype: type[np.number]
    """of the ids in the `.bin`"""
    eod_id: int | None
    """id that ends every document; None to leave it out"""


def token_dtype(vocab_size: int) -> type[np.number]:
    """Type of a stored id, as `DType.optimal_dtype` of Megatron-Core chooses it."""
    return np.uint16 if vocab_size < _FIRST_VOCABULARY_OF_INT32 else np.int32


def encode_chunk(settings: EncodeSettings, engine: Engine, chunk: Chunk) -> EncodedChunk:
    """Documents and rejects of `chunk` in its order."""
    found = documents_of(chunk, settings.documents)
    if found.num_records != len(found.numbers) + len(found.rejects):
        raise LostRecords(f"{chunk.source_file}: a record near {chunk.first_record} was lost")
    columns = [spell_column(values) for values in found.metadata]
    arrays = [pa.array(found.numbers, pa.int64()), *(column for _, column in columns)]
    return EncodedChunk(
        source=chunk.source,
        source_file=chunk.source_file,
        end=chunk.end,
        consumed_bytes=chunk.consumed_bytes,
        num_records=found.num_records,
        keys=[_encode_key(settings, engine, texts) for texts in found.texts],
        rows=pa.record_batch(arrays, names=draft_columns(len(columns))),
        kinds=[kind for kind, _ in columns],
        metadata_seen=found.metadata_seen,
        rejects=found.rejects,
    )


def draft_columns(num_metadata: int) -> list[str]:
    """Names in the sidecar's draft: user's keys may be anything, also equal to ours."""
    return ["record", *(f"metadata{i}" for i in range(num_metadata))]


def _encode_key(settings: EncodeSettings, engine: Engine, texts: list[object]) -> EncodedKey:
    if settings.documents.pretokenized:
        ends = np.cumsum([len(ids) for ids in texts], dtype=np.int64)
        empty = np.zeros(0, settings.dtype)
        ids = np.concatenate([empty, *(row.astype(settings.dtype) for row in texts)])
    else:
        encoded = engine.encode_texts(texts)  # type: ignore[arg-type]
        ends, ids = encoded.ends, encoded.ids.astype(settings.dtype)
    lengths = np.diff(ends, prepend=0)
    if settings.eod_id is not None:
        has_ids = lengths > 0
        ids = np.insert(ids, ends[has_ids], settings.eod_id)
        lengths = lengths + has_ids
    return EncodedKey(ids=ids.astype(settings.dtype, copy=False), lengths=lengths.astype(np.int32))
