"""Bytes of a file, decompressed as they are read.

gzip, bzip2, xz and Zstandard by the file's ending, with several members or frames in a file, as
`cat a.gz b.gz` makes. A file that ends inside a compressed stream is damage, never a shorter file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# First bytes. A Zstandard file may begin with a frame to skip: 16 magic numbers of its own.
_MAGIC: dict[str, tuple[bytes, ...]] = {
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes((n, 0x2A, 0x4D, 0x18)) for n in range(0x50, 0x60))),
    ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\x00",),
}

_ZSTD_READ_BYTES = 1 << 17
_ZSTD_LARGEST_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def begins_as_named(path: Path, raw: BinaryIO) -> bool:
    """True if the first bytes are those of the compression that the file's ending names.

    `raw` is at the start of the file before and after.
    """
    first = raw.read(8)
    raw.seek(0)
    magics = _MAGIC.get(path.suffix, ())
    return not magics or not first or any(first[: len(m)] == m[: len(first)] for m in magics)


class ByteStream(Protocol):
    """A source of bytes; an empty `read` is its end."""

    def read(self, size: int, /) -> bytes: ...


class _ZstdReader:
    """Decompressed bytes of all frames; unlike zstandard's own reader it notices truncation."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_LARGEST_WINDOW_BYTES)
        self._frame = self._context.decompressobj()
        self._inside_frame = False
        self._ready = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end. `EOFError` inside a frame."""
        while not self._ready:
            chunk = self._frame.unused_data or self._raw.read(_ZSTD_READ_BYTES)
            if not chunk:
                if self._inside_frame:
                    raise EOFError("the last Zstandard frame is incomplete")
                return b""
            if self._frame.eof:
                self._frame = self._context.decompressobj()
            self._ready = memoryview(self._frame.decompress(chunk))
            self._inside_frame = not self._frame.eof
        taken, self._ready = self._ready[:size], self._ready[size:]
        return bytes(taken)


class _SteppedReader:
    """Reads in steps of a library's reader: one long `read` loses the bytes before damage."""

    def __init__(self, stream: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile) -> None:
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        return self._stream.read1(size)


_DECOMPRESSORS: dict[str, Callable[[BinaryIO], ByteStream]] = {
    ".gz": lambda raw: _SteppedReader(gzip.GzipFile(fileobj=raw)),
    ".bz2": lambda raw: _SteppedReader(bz2.BZ2File(raw)),
    ".xz": lambda raw: _SteppedReader(lzma.LZMAFile(raw)),  # noqa: SIM115
    ".zst": _ZstdReader,
}


def open_stream(path: Path, raw: BinaryIO) -> ByteStream:
    """Return the decompressed content of `path`, which is open as `raw`.

    A file of no bytes has no content, whatever its ending.
    """
    if path.suffix not in _DECOMPRESSORS or path.stat().st_size == 0:
        return raw
    return _DECOMPRESSORS[path.suffix](raw)


def is_damage(error: Exception) -> bool:
    """True if `error` is about the content of a compressed file, not about the disk."""
    return isinstance(error, _DAMAGE) or (isinstance(error, OSError) and error.errno is None)


def skip(stream: ByteStream, num_bytes: int) -> None:
    """Move on by `num_bytes`: by a seek in a plain file, else by decompressing."""
    if isinstance(stream, (io.BufferedReader, io.FileIO)):
        stream.seek(num_bytes)
        return
    while num_bytes > 0:
        read = len(stream.read(min(num_bytes, 1 << 20)))
        assert read, "an input shrank although its size and time are the same"
        num_bytes -= read
