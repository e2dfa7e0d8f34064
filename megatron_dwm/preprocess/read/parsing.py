"""Parses a line into a JSON object, and reads the values of an object's keys.

orjson parses; what it refuses goes to the standard library, which decides (as in Megatron-LM's
tool, which uses it) and says what is wrong. So NaN, numbers of any length and unpaired surrogates
outside the text are accepted as there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import orjson

from megatron_dwm.preprocess.records import BadRecord


def parse_record(payload: bytes) -> dict[str, object]:
    """The JSON object that a line holds; `BadRecord` if it does not hold one."""
    try:
        record = orjson.loads(payload)
    except orjson.JSONDecodeError:
        record = parse_slowly(payload)
    if not isinstance(record, dict):
        raise BadRecord("wrong type", f"expected a JSON object, found {json_type(record)}")
    return record


def parse_slowly(payload: bytes) -> object:
    """The value as the standard library parses it; `BadRecord` with the place of the fault."""
    try:
        return json.loads(payload.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = f"invalid UTF-8 at byte {error.start + 1} of the line"
        raise BadRecord("invalid UTF-8", at) from None
    except json.JSONDecodeError as error:
        at = f"broken JSON: {error.msg} at character {error.pos + 1}"
        raise BadRecord("broken JSON", at) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise BadRecord("broken JSON", f"JSON that cannot be read: {error}") from None


def texts_of(record: dict[str, object], key: str) -> str | list[str]:
    """The string under `key`, or a list of strings: one document of several sequences.

    `BadRecord` if it is neither, or UTF-8 cannot hold one.
    """
    value = value_of(record, key)
    if not isinstance(value, list):
        return text_of(record, key)
    for number, part in enumerate(value, start=1):
        if not isinstance(part, str):
            detail = f'"{key}" is an array whose item {number} is {json_type(part)}, not a string'
            raise BadRecord("wrong type", detail)
        _require_utf8(part, key)
    return value


def text_of(record: dict[str, object], key: str) -> str:
    """The string under `key`; `BadRecord` if there is none that UTF-8 can hold."""
    value = value_of(record, key)
    if not isinstance(value, str):
        raise BadRecord("wrong type", f'"{key}" is {json_type(value)}, expected a string')
    _require_utf8(value, key)
    return value


def _require_utf8(value: str, key: str) -> None:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            detail = f'"{key}" holds an unpaired surrogate (\\ud800 to \\udfff)'
            raise BadRecord("invalid UTF-8", detail) from None


def value_of(record: dict[str, object], key: str) -> object:
    """The value under `key`; `BadRecord` if there is none."""
    if key not in record:
        raise BadRecord("missing key", f'no key "{key}" in the record')
    return record[key]


def json_type(value: object) -> str:
    """The type of a JSON value, or of one in a table, in words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    names |= {type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), f"of type {type(value).__name__}")


def begins_an_array(line: bytes) -> bool:
    """True if a file that begins with `line` is one JSON array of objects, not JSON Lines."""
    beginning = line.lstrip()
    if not beginning.startswith(b"["):
        return False
    try:
        items = orjson.loads(beginning)
    except orjson.JSONDecodeError:
        return beginning[1:].lstrip()[:1] in (b"", b"{")
    return any(isinstance(item, dict) for item in items)


def lines_of(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Index and content of every line that is not white space alone."""
    for index, line in enumerate(content.split(b"\n")):
        if line and not line.isspace():
            yield index, line
