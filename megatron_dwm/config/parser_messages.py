"""What jsonargparse says of a wrong value, on one line and in plain words."""

from __future__ import annotations

import re
from pathlib import Path

# Of a wrong value for a key that may be empty.
_OPTIONAL = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[.+, NoneType\] "
    r"Errors: - (.+) - Expected a NoneType Given value type: \w+ Given value: (.*)"
)
_NO_INTEGER = re.compile(r"invalid literal for int\(\) with base 10: ('.*')")


def one_line(message: str, file: Path | None) -> str:
    """Returns jsonargparse's message on one line, with plain words for types."""
    text = re.sub(r"\s+", " ", message)
    text = re.sub(r"Parser key \"([\w.]+)\":", r"\1:", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
    text = text.replace("Expected a Literal", "expected one of ")
    text = _NO_INTEGER.sub(r"Expected a whole number. Got value: \1", text)
    text = _OPTIONAL.sub(r"\1, or null. Got value: \2", text)
    where = f" (from {file} or the command line)" if file else ""
    return text + where
