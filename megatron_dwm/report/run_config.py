"""Reads the `config.yaml` of a run for its report: what is broken there becomes a note."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# Keys that the report computes with, and what they must be.
_KINDS: dict[tuple[str, str], tuple[type | tuple[type, ...], str]] = {
    ("training", "steps"): (int, "a whole number"),
    ("training", "global_batch_size"): (int, "a whole number"),
    ("data", "sequence_length"): (int, "a whole number"),
    ("data", "train"): (list, "a list of prefixes"),
    ("data", "tokenizer"): (str, "a path"),
    ("policy", "name"): (str, "a name"),
}


def read_config(path: Path) -> tuple[Mapping[str, Any], str, list[str]]:
    """Returns the sections, the file's text, and notes on what is missing or broken."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        return {}, "", ["config.yaml is missing, so settings are unknown"]
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        return {}, "", [f"config.yaml cannot be read ({reason}), so settings are unknown"]
    if not isinstance(content, dict):
        return {}, text, ["config.yaml has no sections, so settings are unknown"]
    return content, text, _without_wrong_values(content)


def _without_wrong_values(content: dict[str, Any]) -> list[str]:
    """Set values of another kind than the report needs to None, in place; a note for each."""
    notes = []
    for (section, name), (kind, expected) in _KINDS.items():
        values = content.get(section)
        if not isinstance(values, dict):
            continue
        value = values.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            notes.append(
                f"config.yaml has {section}.{name} {value!r}, expected {expected}; it is left out"
            )
            values[name] = None
    return notes
