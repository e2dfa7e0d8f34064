"""Reads JSON Lines files of text: validation sets and held-out text.

Cost: one read of the file, and the ids of all its tokens in memory (4 bytes each). These files are
small compared with the training data. Blank lines are skipped.
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
    """Returns the text by which two passages are compared, which ignores white space."""
    return " ".join(text.split())


def read_passages(path: str, key: str, domain_keys: tuple[str, ...]) -> Iterator[Passage]:
    """Yields the passages of the file at `path`, in order.

    Args:
        path: a JSON Lines file, an object with a string `text` in every line.
        key: the configuration key that named it, for messages.
        domain_keys: dotted paths of the domain in an object; the first one with a value counts.

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
    """Returns, as text, the value of the first key that is neither missing, null nor empty."""
    for key in domain_keys:
        _, value = look_up(record, key)
        if value is not None and value != "":
            return str(value)
    return None
