"""The names of all keys, and the one that a user meant who typed another.

A key is looked for in the section that was typed. Abbreviations are common (`weighting.lr`,
`parallel.tp`), and no measure of similar spelling knows them, so initials and whole words come
first, and the spelling (difflib) decides the rest.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools

from megatron_dwm.config.key import entries
from megatron_dwm.config.schema import Config

# Below this the spelling says little, and a key of another section may have the very name.
_SIMILAR = 0.6
_SAME, _INITIALS, _WHOLE_WORDS, _BEGINNINGS = 3.0, 2.0, 1.5, 1.25


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of a configuration, in the order of the schema."""
    return tuple(entry.name for entry in entries(Config()))


def known_sections() -> list[str]:
    """The sections of a configuration, in the order of the schema."""
    return [section.name for section in dataclasses.fields(Config)]


def unknown_key(name: str) -> str:
    """What is said of a key that does not exist."""
    return f"unknown key '{name}'; the nearest known key is '{nearest_key(name)}'"


def nearest_key(name: str) -> str:
    """The known key that is most likely meant by `name`, which is dotted or a key's last part."""
    section, _, key = name.rpartition(".")
    mine = _section_of(section)
    inside = [known for known in known_keys() if known.startswith(f"{mine}.")]
    best = _best(key, inside) if inside else None
    if best is not None and _likeness(key, best) >= _SIMILAR:
        return best
    anywhere = _best(key, list(known_keys()))
    return anywhere if best is None or _likeness(key, anywhere) >= 1.0 else best


def nearest_section(name: str) -> str:
    """The section that is most likely meant by `name`."""
    return difflib.get_close_matches(name, known_sections(), n=1, cutoff=0.0)[0]


def _section_of(typed: str) -> str | None:
    """The section that was typed, or one of very similar spelling."""
    found = difflib.get_close_matches(typed, known_sections(), n=1, cutoff=_SIMILAR)
    return found[0] if found else None


def _best(key: str, known: list[str]) -> str:
    """Of equals the first, in the order of the schema."""
    return max(known, key=lambda name: _likeness(key, name))


def _likeness(key: str, known: str) -> float:
    """How likely `key`, a name without its section, means the known key: above 1 by its words,
    else the ratio of similar spelling.
    """
    section, name = known.split(".")
    words, typed = name.split("_"), key.lower().replace("-", "_")
    if typed == name:
        return _SAME
    if typed in _abbreviations(section, words):
        return _INITIALS
    if f"_{typed}_" in f"_{name}_" or f"_{name}_" in f"_{typed}_":
        return _WHOLE_WORDS
    pieces = typed.split("_")
    if len(pieces) <= len(words) and _begin(pieces, words):
        return _BEGINNINGS
    return difflib.SequenceMatcher(None, typed, name).ratio()


def _abbreviations(section: str, words: list[str]) -> set[str]:
    """Initials: lr of learning_rate, bs of global_batch_size, tp of parallel.tensor."""
    letters = "".join(word[0] for word in words)
    return {found for found in (letters, letters[1:], letters + section[0]) if len(found) > 1}


def _begin(pieces: list[str], words: list[str]) -> bool:
    """True if the pieces begin some of the words, in order: seq_len of sequence_length."""
    rest = iter(words)
    return all(any(word.startswith(piece) for word in rest) for piece in pieces if piece)
