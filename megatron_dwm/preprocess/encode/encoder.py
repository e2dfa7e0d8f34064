"""Encodes a chunk of records into token ids and rows of the sidecar: the work of a thread.

The ids are those of Megatron-LM's `tools/preprocess_data.py`, class Encoder: those of the text,
then the end of document if it is asked for and only if there are ids. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa

from megatron_dwm.preprocess.encode.metadata import spell_column
from megatron_dwm.preprocess.read.documents import DocumentSettings, documents_of
from megatron_dwm.preprocess.records import Chunk, Content, EncodedChunk, EncodedKey
from megatron_dwm.tokenizer import Engine, SpecialTokens

_FIRST_VOCABULARY_OF_INT32 = 65500


class LostRecords(RuntimeError):
    """Raised if the counts do not add up: a fault of this program, never of the input."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """How documents become ids."""

    documents: DocumentSettings
    dtype: type[np.number]
    """type of the ids in the `.bin`"""
    around: SpecialTokens
    """ids before and after every text"""
    eod_id: int | None
    """id that ends every document; None to leave it out"""


def token_dtype(vocab_size: int) -> type[np.number]:
    """The type of a stored id, as `DType.optimal_dtype` of Megatron-Core chooses it."""
    return np.uint16 if vocab_size < _FIRST_VOCABULARY_OF_INT32 else np.int32


def encode_chunk(settings: EncodeSettings, engine: Engine, chunk: Chunk) -> EncodedChunk:
    """Encode the documents of `chunk`; they and the rejects keep its order."""
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
    """Names of the draft's columns; not the user's keys, which may equal ours."""
    return ["record", *(f"metadata{i}" for i in range(num_metadata))]


def _encode_key(settings: EncodeSettings, engine: Engine, texts: list[Content]) -> EncodedKey:
    """Encode the documents of one key into ids and signed lengths.

    As Megatron-LM: special tokens around each text, an end after a document's last sequence that
    has ids; a text without ids is no sequence.
    """
    documents = [text if isinstance(text, list) else [text] for text in texts]
    of_document = np.repeat(np.arange(len(documents)), [len(parts) for parts in documents])
    ids, ends = _encode_texts(settings, engine, [part for parts in documents for part in parts])
    starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)]
    before, after = settings.around.before, settings.around.after
    lengths = ends - starts + len(before) + len(after)
    filled = np.flatnonzero(lengths)
    owners = of_document[filled]
    if settings.eod_id is None:
        ended = np.zeros(len(ends), bool)
    else:
        ended = _at(filled[np.diff(owners, append=len(documents)) > 0], len(ends))
    at = [starts] * len(before) + [ends] * (len(after) + 1)
    added = np.array([*before, *after, settings.eod_id or 0], settings.dtype)
    is_added = np.ones((len(ends), len(at)), bool)
    is_added[:, -1] = ended
    if is_added.any():
        places = np.stack(at, axis=1)[is_added]
        ids = np.insert(ids, places, np.broadcast_to(added, is_added.shape)[is_added])
    lengths = (lengths + ended)[filled]
    return EncodedKey(ids=ids, signed_lengths=_signed_lengths(lengths, owners, len(documents)))


def _encode_texts(
    settings: EncodeSettings, engine: Engine, texts: list[str | np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts and the end of each; arrays of ids are kept as they are."""
    if not settings.documents.pretokenized:
        encoded = engine.encode_texts(cast(list[str], texts))
        return encoded.ids.astype(settings.dtype, copy=False), encoded.ends
    empty = np.zeros(0, settings.dtype)
    rows = cast(list[np.ndarray], texts)
    ids = np.concatenate([empty, *(row.astype(settings.dtype) for row in rows)])
    return ids, np.cumsum([len(row) for row in rows], dtype=np.int64)


def _at(places: np.ndarray, size: int) -> np.ndarray:
    found = np.zeros(size, bool)
    found[places] = True
    return found


def _signed_lengths(lengths: np.ndarray, owners: np.ndarray, num_documents: int) -> np.ndarray:
    """Sign the lengths of the sequences of documents `owners` (index_writer.py)."""
    is_first = np.diff(owners, prepend=-1) > 0
    signed_lengths = np.where(is_first, lengths, -lengths).astype(np.int32)
    empty = np.flatnonzero(~_at(owners, num_documents))
    return np.insert(signed_lengths, np.searchsorted(owners, empty), 0)
