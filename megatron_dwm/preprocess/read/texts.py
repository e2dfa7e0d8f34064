"""Corpora as plain lines and texts, one after the other, for tools that do not encode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.read.documents import DocumentSettings, documents_of
from megatron_dwm.preprocess.read.inputs import ReadSettings, find_inputs, read_inputs
from megatron_dwm.preprocess.read.parsing import lines_of
from megatron_dwm.preprocess.records import Chunk, Position
from megatron_dwm.preprocess.settings import MAX_RECORD_BYTES


def read_chunks(names: Sequence[str], key: str = "text") -> Iterator[Chunk]:
    """Chunks of all inputs that `names` stand for; `UserError` for a damaged one."""
    settings = ReadSettings(columns=(key,), max_record_bytes=MAX_RECORD_BYTES)
    yield from read_inputs(find_inputs(names), Position(), settings)


def read_lines_of(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """FILE:LINE and content of every line that is not white space alone.

    Raises `UserError` for a damaged file, an over-long line, or a table, which has no lines.
    """
    for chunk in read_chunks(names):
        if isinstance(chunk.content, pa.Table):
            raise UserError(f"{chunk.source_file}: expected JSON Lines")
        for index, line in lines_of(chunk.content):
            yield f"{chunk.source_file}:{chunk.first_record + index + 1}", line
        _refuse(chunk)


def read_texts(
    names: Sequence[str], key: str, advance: Callable[[int, int], None] = lambda *_: None
) -> Iterator[str]:
    """The text under `key` of every record, or its texts if it has a list of them.

    `advance` is called with the bytes of input and the records of every chunk. Raises `UserError`
    with file and line for a bad record.
    """
    settings = DocumentSettings(
        json_keys=(key,),
        metadata_keys=(),
        max_record_bytes=MAX_RECORD_BYTES,
        vocab_size=0,
        pretokenized=False,
    )
    for chunk in read_chunks(names, key):
        found = documents_of(chunk, settings)
        if found.rejects:
            first = min(found.rejects, key=lambda reject: reject.number)
            raise UserError(f"{chunk.source_file}:{first.number + 1}: {first.detail}")
        for text in found.texts[0]:
            assert not isinstance(text, np.ndarray)
            yield from text if isinstance(text, list) else [text]
        advance(chunk.consumed_bytes, found.num_records)


def first_bytes(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Whole texts until they have `max_bytes` of UTF-8 (the last may go beyond); all for None."""
    size_bytes = 0
    for text in texts:
        yield text
        size_bytes += len(text.encode("utf-8"))
        if max_bytes is not None and size_bytes >= max_bytes:
            return


def _refuse(chunk: Chunk) -> None:
    for reject in chunk.rejects:
        raise UserError(f"{chunk.source_file}:{reject.number + 1}: {reject.detail}")
