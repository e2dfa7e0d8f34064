"""What passes between the steps of preprocessing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RecordBatch:
    """Some consecutive records of one file, still as bytes."""

    source_file: str
    """path as the user wrote it"""
    numbers: list[int]
    """0-based position of each record in its file: the line index for JSON Lines"""
    payloads: list[bytes]
    """the records, undecoded"""
    consumed_bytes: int
    """bytes of the file (compressed, if it is) read for this batch, for progress"""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A record that is no document, and why."""

    number: int
    """0-based position in its file"""
    reason: str
    """what is wrong, in a few words"""
    payload: bytes
    """the record"""


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """A record after tokenizing."""

    number: int
    """0-based position in its file"""
    ids: tuple[np.ndarray, ...]
    """token ids for each of the JSON keys; length 0 for an empty document"""
    metadata: tuple[object, ...]
    """JSON value for each of the metadata keys; None where the record has none"""
    missing: tuple[bool, ...]
    """for each metadata key whether the record lacks it (a null is not lacking)"""


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """What became of the records of a batch, in their order."""

    source_file: str
    consumed_bytes: int
    results: list[EncodedDocument | Reject]
