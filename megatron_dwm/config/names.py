"""The names of all keys, and the key that a user most likely meant by an unknown name.

The search starts in the section that was typed. Abbreviations are common (`weighting.lr`,
`parallel.tp`) and score low on similar spelling, so initials and whole words are compared first,
then the spelling (difflib).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools

from megatron_dwm.config.key import entries
from megatron_dwm.config.not_supported import not_supported
from megatron_dwm.config.schema import Config

# Below this ratio a match of spelling is chance; a key of another section may match exactly.
_SIMILAR = 0.6
_SAME, _INITIALS, _WHOLE_WORDS, _BEGINNINGS = 3.0, 2.0, 1.5, 1.25


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Returns every dotted key of a configuration, in the order of the schema."""
    return tuple(entry.name for entry in entries(Config()))


def known_sections() -> list[str]:
    """Returns the sections of a configuration, in the order of the schema."""
    return [section.name for section in dataclasses.fields(Config)]


def unknown_key(name: str) -> str:
    """Returns the message about a key that does not exist."""
    what = not_supported(name)
    if what is not None:
        return f"unknown key '{name}': {what} is not supported (docs/huggingface.md); leave it out"
    return f"unknown key '{name}'; the nearest known key is '{nearest_key(name)}'"


def nearest_key(name: str) -> str:
    """Returns the known key most likely meant by `name`, a dotted key or a key without section.

    >>> nearest_key("training.batch_size")
    'training.global_batch_size'
    >>> nearest_key("lr")
    'training.learning_rate'
    >>> nearest_key("weighting.seq_len")
    'data.sequence_length'
    """
    section, _, key = name.rpartition(".")
    mine = _section_of(section)
    inside = [known for known in known_keys() if known.startswith(f"{mine}.")]
    best = _best(key, inside) if inside else None
    if best is not None and _likeness(key, best) >= _SIMILAR:
        return best
    anywhere = _best(key, list(known_keys()))
    return anywhere if best is None or _likeness(key, anywhere) >= 1.0 else best


def nearest_section(name: str) -> str:
    """Returns the section most likely meant by `name`."""
    return difflib.get_close_matches(name, known_sections(), n=1, cutoff=0.0)[0]


def _section_of(typed: str) -> str | None:
    """Returns the section of this or similar spelling, or None."""
    found = difflib.get_close_matches(typed, known_sections(), n=1, cutoff=_SIMILAR)
    return found[0] if found else None


def _best(key: str, known: list[str]) -> str:
    """Returns the most likely key; of several equally likely ones, the first in the schema."""
    return max(known, key=lambda name: _likeness(key, name))


def _likeness(key: str, known: str) -> float:
    """Returns a score for `key`, a name without section, meaning the key `known`.

    A match of whole words or initials scores above 1; otherwise the score is difflib's ratio.
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
    """Returns initials: lr for learning_rate, bs for global_batch_size, tp for parallel.tensor."""
    letters = "".join(word[0] for word in words)
    return {found for found in (letters, letters[1:], letters + section[0]) if len(found) > 1}


def _begin(pieces: list[str], words: list[str]) -> bool:
    """True if the pieces begin some of the words, in order, as seq_len does sequence_length."""
    rest = iter(words)
    return all(any(word.startswith(piece) for word in rest) for piece in pieces if piece)
