"""JSON Lines files as chunks of whole lines.

Memory is one chunk and one line: a line longer than the limit is read to its end and reported, but
not held. A byte-order mark at the start of a file is left out.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from megatron_dwm.preprocess.read.streams import (
    ByteStream,
    begins_as_named,
    is_damage,
    open_stream,
    skip,
)
from megatron_dwm.preprocess.records import Chunk, Position, Reject

CHUNK_BYTES = 8 << 20
"""Decompressed bytes of a chunk; a call of gigatoken costs some 5 ms, whatever its size."""
_KEPT_BYTES = 200


def read_lines(
    path: Path, name: str, start: Position, *, max_record_bytes: int, chunk_bytes: int
) -> Iterator[Chunk]:
    """Chunks of the lines of `path` from `start` on."""
    with path.open("rb") as raw:
        stream = open_stream(path, raw)
        reader = _LineReader(name, raw, stream, start, max_record_bytes, chunk_bytes)
        if not begins_as_named(path, raw):
            reader.damage = f"not a {path.suffix} file, as its ending says"
        elif start.offset:
            skip(stream, start.offset)
        yield from reader.chunks()


@dataclass
class _LineReader:
    name: str
    raw: BinaryIO
    stream: ByteStream
    position: Position
    max_record_bytes: int
    chunk_bytes: int
    held: bytearray = field(default_factory=bytearray)
    """bytes that are read and in no chunk yet: at most a chunk and the beginning of a line"""
    raw_position: int = 0
    damage: str | None = None

    def chunks(self) -> Iterator[Chunk]:
        """Chunks up to the end of the file or its first damage."""
        self._leave_out_mark()
        is_more = True
        while is_more:
            is_more = self._fill()
            cut = self.held.rfind(b"\n") + 1
            if cut:
                yield self._take(cut)
            if len(self.held) > self.max_record_bytes:
                yield self._overlong_line()
        if self.damage is not None:
            yield self._damaged_rest()
        elif self.held:
            yield self._take(len(self.held))

    def _leave_out_mark(self) -> None:
        if self.position.offset == 0 and self.damage is None:
            self._read_more(len(codecs.BOM_UTF8))
            if self.held == codecs.BOM_UTF8:
                self.held.clear()
                self.position = self._moved(len(codecs.BOM_UTF8), 0)

    def _fill(self) -> bool:
        """Read until there is a chunk; returns False at the end of the stream."""
        if self.damage is not None:  # a reader that has failed may go on from anywhere
            return False
        wanted = len(self.held) + self.chunk_bytes
        while len(self.held) < wanted:
            if not self._read_more(wanted - len(self.held)):
                return False
        return True

    def _read_more(self, num_bytes: int) -> bool:
        try:
            data = self.stream.read(num_bytes)
        except Exception as error:
            if not is_damage(error):
                raise  # the disk, not the content
            self.damage = str(error)
            return False
        self.held += data
        return bool(data)

    def _take(self, size: int) -> Chunk:
        content = bytes(memoryview(self.held)[:size])
        del self.held[:size]
        first = self.position.record
        is_cut = bool(content) and not content.endswith(b"\n")
        self.position = self._moved(size, content.count(b"\n") + is_cut)
        return self._chunk(content, first)

    def _overlong_line(self) -> Chunk:
        """Read an over-long line to its end and return it as a reject."""
        number, size = self.position.record, len(self.held)
        beginning = bytes(self.held[:_KEPT_BYTES])
        self.held.clear()
        while self._read_more(self.chunk_bytes):
            end = self.held.find(b"\n") + 1
            size += end or len(self.held)
            del self.held[: end or len(self.held)]
            if end:
                break
        self.position = self._moved(size, 1)
        detail = f"line of {size} bytes, more than --max-record-bytes {self.max_record_bytes}"
        reject = Reject(number=number, reason="over-long line", detail=detail, payload=beginning)
        return self._chunk(b"", number, reject)

    def _damaged_rest(self) -> Chunk:
        """Return the lines before the damage, with the rest of the file as one reject."""
        before = self._take(self.held.rfind(b"\n") + 1)
        number = self.position.record
        reject = Reject(
            number=number,
            reason="truncated compressed stream",
            detail=f"damaged or truncated compressed stream after line {number} ({self.damage})",
            payload=bytes(self.held[:_KEPT_BYTES]),
        )
        return replace(before, rejects=(reject,), end=Position(input=self.position.input + 1))

    def _chunk(self, content: bytes, first_record: int, *rejects: Reject) -> Chunk:
        return Chunk(
            source=self.position.input,
            source_file=self.name,
            content=content,
            first_record=first_record,
            end=self.position,
            consumed_bytes=self._consumed(),
            rejects=rejects,
        )

    def _moved(self, num_bytes: int, lines: int) -> Position:
        return Position(
            input=self.position.input,
            offset=self.position.offset + num_bytes,
            record=self.position.record + lines,
        )

    def _consumed(self) -> int:
        before, self.raw_position = self.raw_position, self.raw.tell()
        return self.raw_position - before
