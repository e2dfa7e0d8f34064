"""Reading JSON Lines files of text: validation sets and held-out text.

Costs one pass over the file and the ids of all its tokens in memory (4 bytes each); these files are
small beside the training data. Blank lines are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.json_lines import look_up, numbered_lines


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One line of a file."""

    text: str
    domain: str | None
    line: int
    """number of the line, from 1"""


def bare_text(text: str) -> str:
    """The text by which two passages are compared: white space makes no difference."""
    return " ".join(text.split())


def read_passages(path: str, key: str, domain_keys: tuple[str, ...]) -> Iterator[Passage]:
    """The passages of the file at `path`, in order.

    Args:
        path: a JSON Lines file, an object with a string `text` in every line.
        key: the configuration key that named it, for messages.
        domain_keys: dotted paths to look for the domain under, best first.

    Raises:
        UserError: no such file, no passage in it, or a line that is not such an object.
    """
    if not Path(path).is_file():
        raise UserError(f"{key}: no file {path}")
    line = 0
    for line, raw in numbered_lines(Path(path)):
        yield _passage(raw, f"{path} line {line}", domain_keys, line)
    if not line:
        raise UserError(f"{path} ({key}) is empty: expected an object with a `text` in every line")


def _passage(raw: bytes, where: str, domain_keys: tuple[str, ...], line: int) -> Passage:
    try:
        record = json.loads(raw)
        if isinstance(record, dict):
            str(record.get("text")).encode()
    except ValueError as error:  # broken JSON, bytes that are not UTF-8, or half a surrogate pair
        raise UserError(
            f"{where} is not JSON in UTF-8 ({error}): expected one object a line"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f"{where} has no string `text`: expected an object with a `text`")
    return Passage(text=record["text"], domain=_domain(record, domain_keys), line=line)


def _domain(record: dict[str, Any], domain_keys: tuple[str, ...]) -> str | None:
    """The value of the first of the keys that is present, and neither null nor empty, as text."""
    for key in domain_keys:
        _, value = look_up(record, key)
        if value is not None and value != "":
            return str(value)
    return None
