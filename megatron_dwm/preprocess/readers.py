"""Corpora as a stream of record batches.

JSON Lines, plain or compressed with gzip, bzip2, xz or Zstandard (by the file's ending), read as a
stream: memory is one batch, whatever the size of the file. A line of white space alone is not a
record. A compressed file that ends too early is an error, never a shorter corpus.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import zstandard

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.records import RecordBatch

_BATCH_RECORDS = 256
_BATCH_BYTES = 1 << 20
_ZSTD_READ_BYTES = 1 << 17
_ZSTD_LARGEST_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of all frames; unlike zstandard's own reader it notices truncation."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_LARGEST_WINDOW_BYTES)
        self._frame = self._context.decompressobj()
        self._inside_frame = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            chunk = self._frame.unused_data or self._raw.read(_ZSTD_READ_BYTES)
            if not chunk:
                if self._inside_frame:
                    raise EOFError("the last Zstandard frame is incomplete")
                return 0
            if self._frame.eof:
                self._frame = self._context.decompressobj()
            self._ready = self._frame.decompress(chunk)
            self._inside_frame = not self._frame.eof
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)


def _plain(raw: BinaryIO) -> BinaryIO:
    return raw


def _zstd(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(_ZstdReader(raw), _ZSTD_READ_BYTES)


_DECOMPRESSORS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".jsonl": _plain,
    ".json": _plain,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}


def check_inputs(paths: Sequence[str]) -> None:
    """Raise `UserError` for the first path that is no readable corpus of a known format."""
    for path in paths:
        if not Path(path).exists():
            raise UserError(f"{path}: no such input file")
        if not Path(path).is_file():
            raise UserError(f"{path}: not a file; name the files of the corpus themselves")
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: you may not read this file")
        if Path(path).suffix not in _DECOMPRESSORS:
            known = ".jsonl, .jsonl.gz, .jsonl.zst, .jsonl.bz2, .jsonl.xz"
            raise UserError(f"{path}: format not known from its ending; expected one of {known}")


def read_batches(paths: Iterable[str]) -> Iterator[RecordBatch]:
    """Batches of the records of all files in order (call `check_inputs` first).

    Raises `UserError` for a damaged or truncated compressed file.
    """
    for path in paths:
        yield from _read_file(path)


def read_texts(paths: Iterable[str], key: str) -> Iterator[str]:
    """The string under `key` of every record; `UserError` with file and line for a bad record."""
    for batch in read_batches(paths):
        for number, payload in zip(batch.numbers, batch.payloads, strict=True):
            try:
                yield text_of(parse_record(payload), key)
            except BadRecord as error:
                raise UserError(f"{batch.source_file}:{number + 1}: {error}") from None


class BadRecord(Exception):
    """A record that is no document; its message says why in a few words."""


def parse_record(payload: bytes) -> dict[str, object]:
    """The JSON object that a line holds; `BadRecord` if it does not hold one."""
    try:
        record = json.loads(payload.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"invalid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"broken JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise BadRecord(f"JSON that cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord(f"expected a JSON object, found {_json_type(record)}")
    return record


def text_of(record: dict[str, object], key: str) -> str:
    """The string under `key`; `BadRecord` if there is none."""
    if key not in record:
        raise BadRecord(f'no key "{key}" in the record')
    if not isinstance(record[key], str):
        raise BadRecord(f'"{key}" is {_json_type(record[key])}, expected a string')
    return record[key]


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _read_file(path: str) -> Iterator[RecordBatch]:
    with Path(path).open("rb") as raw, _DECOMPRESSORS[Path(path).suffix](raw) as stream:
        lines = enumerate(_lines(stream, path))
        position_bytes = 0
        while True:
            numbers, payloads = _take(lines)
            if not payloads:
                return
            consumed_bytes = raw.tell() - position_bytes
            position_bytes += consumed_bytes
            yield RecordBatch(
                source_file=path,
                numbers=numbers,
                payloads=payloads,
                consumed_bytes=consumed_bytes,
            )


def _take(lines: Iterator[tuple[int, bytes]]) -> tuple[list[int], list[bytes]]:
    """The next records up to either limit of a batch."""
    numbers: list[int] = []
    payloads: list[bytes] = []
    size_bytes = 0
    for number, line in lines:
        if line.isspace():
            continue
        numbers.append(number)
        payloads.append(line)
        size_bytes += len(line)
        if len(payloads) == _BATCH_RECORDS or size_bytes >= _BATCH_BYTES:
            break
    return numbers, payloads


def _lines(stream: BinaryIO, path: str) -> Iterator[bytes]:
    count = 0
    try:
        for line in stream:
            count += 1
            yield line
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the content
        raise UserError(
            f"{path}: damaged or truncated after line {count} ({error}); fetch the file again"
        ) from None
