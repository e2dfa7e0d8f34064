"""Checks the files of a study's text, which may be the user's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from megatron_dwm.config import UserError


def check_records(file: Path, *, domain: bool) -> set[str]:
    """Returns the domains of a JSON Lines file.

    Raises UserError with file and line for a record without `text`, or, if `domain` is set, without
    a `domain`; and for a file without records.
    """
    found: set[str] = set()
    for number, record in _records(file):
        expected = ["text", "domain"] if domain else ["text"]
        for key in expected:
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise UserError(f"{file} line {number}: expected a record with a text `{key}`")
        found.add(record.get("domain", ""))
    if not found:
        raise UserError(f"{file}: has no record")
    return found


def check_tokenizer(file: Path) -> None:
    """Raise UserError if a file is no SentencePiece model."""
    try:
        SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        raise UserError(f"{file}: is no SentencePiece model") from None


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text") from None
    except ValueError as error:
        raise UserError(f"{file} line {number}: is not JSON: {error}") from None
