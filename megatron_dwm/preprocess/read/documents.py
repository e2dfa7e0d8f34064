"""Parses a chunk into the texts and metadata of its documents; every other record is a reject.

This runs in worker threads and holds Python's lock, so it does little for each record.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.json_lines import look_up
from megatron_dwm.preprocess.read.parsing import (
    begins_an_array,
    json_type,
    lines_of,
    parse_record,
    parse_slowly,
    texts_of,
    value_of,
)
from megatron_dwm.preprocess.records import BadRecord, Chunk, Content, Documents, Reject

_KEPT_BYTES = 200
_FIRST_INTEGER_ORJSON_ROUNDS = float(1 << 63)


@dataclass(frozen=True, kw_only=True)
class DocumentSettings:
    """What makes a record a document."""

    json_keys: tuple[str, ...]
    metadata_keys: tuple[str, ...]
    max_record_bytes: int
    vocab_size: int
    """bound of the ids of pretokenized records"""
    pretokenized: bool


def documents_of(chunk: Chunk, settings: DocumentSettings) -> Documents:
    """The documents of `chunk`, in order; `UserError` if the file is one JSON array."""
    found = Documents(
        texts=[[] for _ in settings.json_keys],
        metadata=[[] for _ in settings.metadata_keys],
        metadata_seen=[False] * len(settings.metadata_keys),
    )
    if isinstance(chunk.content, bytes):
        _refuse_array(chunk, chunk.content)
        _take_lines(found, chunk, chunk.content, settings)
    else:
        _take_rows(found, chunk, chunk.content, settings)
    found.rejects.extend(chunk.rejects)
    found.num_records += len(chunk.rejects)
    return found


def _take_lines(found: Documents, chunk: Chunk, content: bytes, settings: DocumentSettings) -> None:
    lines = list(lines_of(content))
    found.num_records += len(lines)
    for index, line in lines:
        number = chunk.first_record + index
        try:
            if len(line) > settings.max_record_bytes:
                raise _too_long(len(line), settings)
            record = parse_record(line)
            _take(found, number, record, settings, line)
        except BadRecord as error:
            found.rejects.append(_reject(number, error, line))


def _refuse_array(chunk: Chunk, content: bytes) -> None:
    """Raise `UserError` for a file that is one JSON array, also where bad records are skipped."""
    if chunk.first_record:
        return
    firsts = [line for _, line in itertools.islice(lines_of(content), 1)]
    firsts += [reject.payload for reject in chunk.rejects if not content and reject.number == 0]
    if any(begins_an_array(line) for line in firsts):
        raise UserError(
            f"{chunk.source_file}: one JSON array; expected an object on each line, which "
            "`jq -c '.[]' FILE > FILE.jsonl` makes of it"
        )


def _take_rows(found: Documents, chunk: Chunk, table: pa.Table, settings: DocumentSettings) -> None:
    found.num_records += table.num_rows
    for index, record in enumerate(_rows(table, settings.json_keys)):
        number = chunk.first_record + index
        try:
            if isinstance(record, BadRecord):
                raise record
            _refuse_long_texts(record, settings)
            _take(found, number, record, settings, None)
        except BadRecord as error:
            found.rejects.append(_reject(number, error, _spell_row(record)))


def _take(
    found: Documents,
    number: int,
    record: dict[str, object],
    settings: DocumentSettings,
    line: bytes | None,
) -> None:
    """Add the document that `record` is; `BadRecord`, with nothing added, if it is none."""
    texts: list[Content]
    if settings.pretokenized:
        texts = [_ids_of(record, key, settings) for key in settings.json_keys]
    else:
        texts = [texts_of(record, key) for key in settings.json_keys]
    found.numbers.append(number)
    for column, text in zip(found.texts, texts, strict=True):
        column.append(text)
    for i, key in enumerate(settings.metadata_keys):
        is_there, value = look_up(record, key)
        if is_there:
            found.metadata_seen[i] = True
            if line is not None and _may_be_rounded(value):
                again = parse_slowly(line)
                assert isinstance(again, dict)
                _, value = look_up(again, key)
        found.metadata[i].append(value)


def _may_be_rounded(value: object) -> bool:
    """True for a float that may be an integer beyond 64 bits, which orjson rounds.

    Integers inside an object are not checked.
    """
    return isinstance(value, float) and abs(value) >= _FIRST_INTEGER_ORJSON_ROUNDS


def _ids_of(record: dict[str, object], key: str, settings: DocumentSettings) -> np.ndarray:
    """The ids under `key`; `BadRecord` if it holds anything but ids of the vocabulary."""
    value = value_of(record, key)
    if isinstance(value, list):
        if any(type(item) is not int for item in value):
            raise BadRecord("wrong type", f'"{key}" holds something that is no whole number')
        value = np.array(value, dtype=object) if _huge(value) else np.array(value, dtype=np.int64)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuO":
        raise BadRecord("wrong type", f'"{key}" is {json_type(value)}, expected an array of ids')
    if len(value) and not 0 <= int(value.min()) <= int(value.max()) < settings.vocab_size:
        detail = f'"{key}" holds an id outside the vocabulary (0 to {settings.vocab_size - 1})'
        raise BadRecord("wrong type", detail)
    return value


def _huge(value: list[int]) -> bool:
    return any(not -(1 << 63) <= item < 1 << 63 for item in value)


def _rows(table: pa.Table, texts: Sequence[str]) -> Iterator[dict[str, object] | BadRecord]:
    """Yields the rows; those with a text that is not UTF-8 as what is wrong."""
    columns = {
        name: _values(table.column(name), name, is_text=name in texts)
        for name in table.column_names
        if name
    }
    for index in range(table.num_rows):
        row = {name: values[index] for name, values in columns.items()}
        yield next((value for value in row.values() if isinstance(value, BadRecord)), row)


def _values(column: pa.ChunkedArray, name: str, *, is_text: bool) -> list[object]:
    """The column as Python values: arrays for lists of integers, `BadRecord` for invalid UTF-8."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and pa.types.is_integer(kind.value_type):
        return [_array(item) for item in column]
    try:
        return [_decoded(value, is_text=is_text) for value in column.to_pylist()]
    except UnicodeDecodeError:
        return [_value(item, name, is_text=is_text) for item in column]


def _array(item: pa.ListScalar) -> np.ndarray | list[object] | None:
    if not item.is_valid:
        return None
    return item.as_py() if item.values.null_count else item.values.to_numpy()


def _decoded(value: object, *, is_text: bool) -> object:
    """The text of a binary column's bytes, which is how some programs write strings.

    Metadata that is none, such as a digest, is spelled in hexadecimal.
    """
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        if is_text:
            raise
        return value.hex()


def _value(item: pa.Scalar, name: str, *, is_text: bool) -> object:
    try:
        return _decoded(item.as_py(), is_text=is_text)
    except UnicodeDecodeError as error:
        detail = f'invalid UTF-8 at byte {error.start + 1} of "{name}"'
        return BadRecord("invalid UTF-8", detail)


def _refuse_long_texts(record: dict[str, object], settings: DocumentSettings) -> None:
    for key in settings.json_keys:
        value = record.get(key)
        parts = value if isinstance(value, list) else [value]
        texts = [part for part in parts if isinstance(part, str)]
        # A character has at most 4 bytes: only texts that might be too long are measured.
        if 4 * sum(map(len, texts)) > settings.max_record_bytes:
            size = sum(len(text.encode("utf-8")) for text in texts)
            if size > settings.max_record_bytes:
                raise _too_long(size, settings)


def _too_long(size: int, settings: DocumentSettings) -> BadRecord:
    limit = settings.max_record_bytes
    return BadRecord(
        "over-long line", f"record of {size} bytes, more than --max-record-bytes {limit}"
    )


def _reject(number: int, error: BadRecord, payload: bytes) -> Reject:
    return Reject(
        number=number, reason=error.reason, detail=str(error), payload=payload[:_KEPT_BYTES]
    )


def _spell_row(record: dict[str, object] | BadRecord) -> bytes:
    """Spell the beginning of a table's row as JSON."""
    if isinstance(record, BadRecord):
        return b""
    short = {k: v[:_KEPT_BYTES] if isinstance(v, (str, list)) else v for k, v in record.items()}
    return json.dumps(short, ensure_ascii=False, default=str).encode("utf-8", "replace")
