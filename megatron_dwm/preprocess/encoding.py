"""One record to token ids and metadata: the work that runs in parallel.

Follows Megatron-LM's `tools/preprocess_data.py`, class Encoder: the ids of the text, then the end
of document if asked for and only if there are ids. Nothing here imports torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from megatron_dwm.preprocess.readers import BadRecord, parse_record, text_of
from megatron_dwm.preprocess.records import EncodedBatch, EncodedDocument, RecordBatch, Reject
from megatron_dwm.tokenizer import Tokenizer, build_tokenizer

_FIRST_VOCABULARY_OF_INT32 = 65500


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """All that a worker has to know."""

    tokenizer_kind: str
    tokenizer_model: str
    json_keys: tuple[str, ...]
    metadata_keys: tuple[str, ...]
    append_eod: bool


def token_dtype(vocab_size: int) -> type[np.number]:
    """Type of a stored id, as `DType.optimal_dtype` of Megatron-Core chooses it."""
    return np.uint16 if vocab_size < _FIRST_VOCABULARY_OF_INT32 else np.int32


def encode_batch(settings: EncodeSettings, batch: RecordBatch) -> EncodedBatch:
    """Documents and rejects of `batch` in its order."""
    tokenizer = _tokenizer(settings.tokenizer_kind, settings.tokenizer_model)
    return EncodedBatch(
        source_file=batch.source_file,
        consumed_bytes=batch.consumed_bytes,
        results=[
            _encode(tokenizer, settings, number, payload)
            for number, payload in zip(batch.numbers, batch.payloads, strict=True)
        ],
    )


@functools.lru_cache(maxsize=1)
def _tokenizer(kind: str, model: str) -> Tokenizer:
    """Built once in each worker process: it reads a file and cannot be sent to one."""
    return build_tokenizer(kind, model)


def _encode(
    tokenizer: Tokenizer, settings: EncodeSettings, number: int, payload: bytes
) -> EncodedDocument | Reject:
    try:
        record = parse_record(payload)
        ids = tuple(_ids(tokenizer, settings, record, key) for key in settings.json_keys)
    except BadRecord as error:
        return Reject(number=number, reason=str(error), payload=payload)
    found = [_look_up(record, key) for key in settings.metadata_keys]
    return EncodedDocument(
        number=number,
        ids=ids,
        metadata=tuple(value for _, value in found),
        missing=tuple(not is_there for is_there, _ in found),
    )


def _ids(
    tokenizer: Tokenizer, settings: EncodeSettings, record: dict[str, object], key: str
) -> np.ndarray:
    try:
        ids = tokenizer.encode(text_of(record, key))
    except UnicodeEncodeError:
        raise BadRecord(f'"{key}" holds an unpaired surrogate (\\ud800 to \\udfff)') from None
    if ids and settings.append_eod:
        ids.append(tokenizer.eod_id)
    return np.array(ids, dtype=token_dtype(tokenizer.vocab_size))


def _look_up(record: dict[str, object], dotted_key: str) -> tuple[bool, object]:
    """Whether `dotted_key` is there and its value: the key as it is, else a path of keys."""
    if dotted_key in record:
        return True, record[dotted_key]
    value: object = record
    for part in dotted_key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value
