"""JSON Lines: a JSON object on each line, and values inside an object by their dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and content of every line that is not white space alone.

    The content includes the line end; the last line may have none. Memory is one line.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line


def look_up(record: dict[str, Any], dotted_key: str) -> tuple[bool, object]:
    """True and the value if `dotted_key` is there: the key as it is, else a path of keys.

    >>> look_up({"text": "...", "meta": {"source": "web"}}, "meta.source")
    (True, 'web')
    >>> look_up({"text": "..."}, "meta.source")
    (False, None)
    """
    if dotted_key in record:
        return True, record[dotted_key]
    value: object = record
    for part in dotted_key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value
