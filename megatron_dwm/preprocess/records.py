"""What passes between the steps of preprocessing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from megatron_dwm.preprocess.encode.metadata import Kind

Reason = Literal[
    "broken JSON",
    "missing key",
    "wrong type",
    "invalid UTF-8",
    "truncated compressed stream",
    "over-long line",
]
"""Why a record is no document; the summary counts records by reason."""


Content = str | list[str] | np.ndarray
"""What a document is made from: a text, a list of texts (its sequences), or an array of ids."""


class BadRecord(Exception):
    """Raised for a record that is no document; its message says why in a few words."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A record that is no document, and why."""

    number: int
    """0-based position in its file: the line index for JSON Lines"""
    reason: Reason
    detail: str
    """what is wrong, in a few words"""
    payload: bytes
    """the record, or its beginning"""


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far the inputs are read: where a run resumes."""

    input: int = 0
    """index of the input"""
    offset: int = 0
    """decompressed bytes (JSON Lines) or rows (other formats) of it that are read"""
    record: int = 0
    """number of the next record in it"""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some consecutive records of one input, before they are parsed."""

    source: int
    """index of the input"""
    source_file: str
    """its name, as the sidecar has it"""
    content: bytes | pa.Table
    """whole lines, or rows"""
    first_record: int
    """number of the first line or row"""
    end: Position
    """where the next chunk begins"""
    consumed_bytes: int
    """bytes of the file (compressed, if it is) read for this chunk, for progress"""
    rejects: tuple[Reject, ...] = ()
    """records after `content` that the reader itself rejects"""

    @property
    def size_bytes(self) -> int:
        """Bytes of memory that the content takes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes


@dataclass(kw_only=True)
class Documents:
    """The records of a chunk that are documents, column by column, and those that are not."""

    numbers: list[int] = field(default_factory=list)
    """0-based position of each document in its file"""
    texts: list[list[Content]]
    """for each of the JSON keys the content of every document"""
    metadata: list[list[object]]
    """for each metadata key the JSON value of every document; None where it has none"""
    metadata_seen: list[bool]
    """for each metadata key True if any record has it (a null counts)"""
    rejects: list[Reject] = field(default_factory=list)
    num_records: int = 0
    """records read, counted before they are parsed"""


@dataclass(frozen=True, kw_only=True)
class EncodedKey:
    """The documents of a chunk under one JSON key."""

    ids: np.ndarray
    """all ids one after the other, in the type of the `.bin`"""
    signed_lengths: np.ndarray
    """int32: the lengths of the sequences, and which begin a document (index_writer.py)"""


@dataclass(frozen=True, kw_only=True)
class EncodedChunk:
    """The documents and rejects of a chunk, encoded, in order."""

    source: int
    source_file: str
    end: Position
    consumed_bytes: int
    num_records: int
    keys: list[EncodedKey]
    rows: pa.RecordBatch
    """the sidecar's draft: a row for each document"""
    kinds: list[Kind]
    """for each metadata key the kind of its values (metadata.py)"""
    metadata_seen: list[bool]
    rejects: list[Reject]
