"""Decodes many sequences at once, to the text that the reference tokenizer gives.

The bytes of every piece are in one table, and a text is one gather from it: some hundred megabytes
a second on one core. How a vocabulary spells bytes is not said in one place of its file, so each
known spelling is tried on trial_texts.py, and the first that gives the reference's texts is used.
If none does, the reference decodes, one sequence at a time. It also decodes sequences whose bytes
are no UTF-8 (cut in the middle of a character). Sequences are what a text was encoded to, whole or
cut short; one that begins elsewhere may keep a space at its beginning that the reference drops.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from megatron_dwm.tokenizer.interface import JSON_KINDS, Piece, Tokenizer
from megatron_dwm.tokenizer.tiktoken_file import spellings_of_bytes
from megatron_dwm.tokenizer.trial_texts import trial_texts

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_UNKNOWN = " \u2047 "


@dataclass(frozen=True, kw_only=True)
class DecodedTexts:
    """Texts of several sequences; a line end follows each of them."""

    content: bytes
    """UTF-8"""
    ends: np.ndarray
    """int64 [sequences]: where each text ends, before its line end"""


class BatchDecoder:
    """Decodes with a table of pieces, or with the reference; used by one thread at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Try the table on the trial's texts: about half a second for 32,000 pieces."""
        self._tokenizer = tokenizer
        texts = trial_texts(tokenizer, ())
        around, end = tokenizer.around, tokenizer.eod_id
        rows = [[*around.before, *tokenizer.encode(t), *around.after, end] for t in texts]
        expected = [tokenizer.decode(row) for row in rows]
        fitting = (t for t in _tables(tokenizer) if _decode_rows(t, tokenizer, rows) == expected)
        self._table = next(fitting, None)

    @property
    def is_fast(self) -> bool:
        """True if the table gives the reference's texts."""
        return self._table is not None

    def decode(self, ids: np.ndarray, ends: np.ndarray) -> DecodedTexts:
        """Returns the texts of the sequences `ids[ends[i-1]:ends[i]]`, none of which is empty."""
        if self._table is None:
            return self._decode_slowly(ids, ends)
        decoded = self._table.decode(ids, ends)
        if decoded.content.isascii() or _is_utf8(decoded.content):
            return decoded
        return self._decode_slowly(ids, ends)

    def _decode_slowly(self, ids: np.ndarray, ends: np.ndarray) -> DecodedTexts:
        rows = np.split(ids, ends[:-1])
        texts = [self._tokenizer.decode(row.tolist()).encode("utf-8") + b"\n" for row in rows]
        sizes = np.array([len(text) for text in texts], np.int64)
        return DecodedTexts(content=b"".join(texts), ends=np.cumsum(sizes) - 1)


class _Table:
    """The bytes of every piece, of the line end, and of pieces at the beginning of a sequence."""

    def __init__(self, pieces: Sequence[bytes], tokenizer: Tokenizer, *, strips: bool) -> None:
        """Set up; strips: True if a text loses the space with which its first piece begins."""
        self._line_end = len(pieces)
        self._num_before = len(tokenizer.around.before)
        self._is_control = np.zeros(len(pieces), dtype=bool)
        self._is_control[list(tokenizer.control_ids().values())] = True
        firsts = [piece.removeprefix(b" ") for piece in pieces] if strips else pieces
        self._bytes = pa.array([*pieces, b"\n", *firsts], pa.binary())

    def decode(self, ids: np.ndarray, ends: np.ndarray) -> DecodedTexts:
        """Decode as `BatchDecoder.decode`; the result may be no UTF-8."""
        rows = ids.astype(np.int64)
        rows[self._firsts(ids, ends)] += self._line_end + 1
        taken = self._bytes.take(pa.array(np.insert(rows, ends, self._line_end)))
        _, offsets, content = taken.buffers()
        at = np.frombuffer(offsets, np.int32, len(taken) + 1)
        line_ends = ends + np.arange(len(ends))
        return DecodedTexts(
            content=content.to_pybytes()[: at[-1]] if content else b"",
            ends=at[line_ends].astype(np.int64),
        )

    def _firsts(self, ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The first id of each sequence that is no special token before the text."""
        firsts = np.concatenate([[0], ends[:-1]])
        for _ in range(self._num_before):
            firsts = np.minimum(firsts + self._is_control[ids[firsts]], ends - 1)
        return firsts


def _tables(tokenizer: Tokenizer) -> Iterator[_Table]:
    """One for each known spelling."""
    pieces = tokenizer.pieces()
    spaces = [_spelled_with_spaces(piece) for piece in pieces]
    yield _Table(spaces, tokenizer, strips=True)
    yield _Table(spaces, tokenizer, strips=False)
    if tokenizer.kind in JSON_KINDS:
        bytes_of = {spelling: bytes([i]) for i, spelling in enumerate(spellings_of_bytes())}
        yield _Table(
            [_spelled_as_bytes(piece, bytes_of) for piece in pieces], tokenizer, strips=False
        )


def _spelled_with_spaces(piece: Piece) -> bytes:
    """SentencePiece's: U+2581 is a space, <0x0A> a byte."""
    if piece.role in ("control", "unused"):
        return b""
    if piece.role == "unknown":
        return _UNKNOWN.encode()
    byte = _BYTE_PIECE.fullmatch(piece.text)
    return bytes.fromhex(byte[1]) if byte else piece.text.replace("\u2581", " ").encode()


def _spelled_as_bytes(piece: Piece, bytes_of: dict[str, bytes]) -> bytes:
    """GPT-2's: a character for each byte; added tokens are plain text."""
    if piece.role in ("control", "unused"):
        return b""
    if all(character in bytes_of for character in piece.text):
        return b"".join(bytes_of[character] for character in piece.text)
    return piece.text.encode()


def _decode_rows(table: _Table, tokenizer: Tokenizer, rows: Sequence[list[int]]) -> list[str]:
    """The texts that the table gives; where they are no UTF-8, those of the reference."""
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    decoded = table.decode(np.array([i for row in rows for i in row], np.int64), ends)
    begins = [0, *(decoded.ends[:-1] + 1).tolist()]
    found = [
        decoded.content[begin:end] for begin, end in zip(begins, decoded.ends.tolist(), strict=True)
    ]
    return [
        text.decode() if _is_utf8(text) else tokenizer.decode(row)
        for text, row in zip(found, rows, strict=True)
    ]


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
