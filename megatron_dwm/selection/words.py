r"""Words of many texts at once, as DSIR's code splits them: `\w+|[^\w\s]+` in Python's sense.

That is NLTK's WordPunctTokenizer. Texts lie in one buffer of UTF-8 with white space after each of
them. Every byte has the class of its character (white space, word, symbol), and a word is a longest
run of one of the last two. A table knows ASCII; other characters are decoded where they begin, so
text that has few of them costs little more. About ten nanoseconds a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

SPACE, WORD, SYMBOL = 0, 1, 2
# Beyond it no character is a letter, a digit or a space, in Unicode up to 16.
_TABLE_SIZE = 0x34000
_LONGEST_CHARACTER = 4


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Texts of D documents in one buffer."""

    content: bytes
    """UTF-8; a line end follows every document"""
    begins_D: np.ndarray
    """int64: first byte of each document"""
    ends_D: np.ndarray
    """int64: the byte after each document, which is a line end"""

    @staticmethod
    def of(texts: list[str]) -> TextBatch:
        """A batch of these texts."""
        encoded = [text.encode("utf-8", "replace") for text in texts]
        return TextBatch.of_bytes(encoded)

    @staticmethod
    def of_bytes(encoded: list[bytes]) -> TextBatch:
        """A batch of these texts in UTF-8."""
        sizes_D = np.array([len(text) + 1 for text in encoded], dtype=np.int64)
        ends_D = np.cumsum(sizes_D)
        return TextBatch(
            content=b"".join(part for text in encoded for part in (text, b"\n")),
            begins_D=ends_D - sizes_D,
            ends_D=ends_D - 1,
        )


@dataclass(frozen=True, kw_only=True)
class Words:
    """The W words of a batch, in order."""

    begins_W: np.ndarray
    ends_W: np.ndarray
    counts_D: np.ndarray
    """int64: words of each document"""
    classes: np.ndarray
    """uint8: the class of each byte of the batch"""

    @property
    def classes_W(self) -> np.ndarray:
        """`WORD` or `SYMBOL`."""
        return self.classes[self.begins_W]


def split_words(batch: TextBatch) -> Words:
    """Returns the words of `batch`, as it is spelled.

    >>> batch = TextBatch.of(["To be, or"])
    >>> words = split_words(batch)
    >>> [batch.content[a:b] for a, b in zip(words.begins_W, words.ends_W, strict=True)]
    [b'To', b'be', b',', b'or']
    """
    classes = classes_of(batch.content)
    is_border = np.ones(len(classes) + 1, dtype=bool)
    np.not_equal(classes[1:], classes[:-1], out=is_border[1:-1])
    is_text = classes != SPACE
    begins_W = np.flatnonzero(is_border[:-1] & is_text)
    firsts = np.searchsorted(begins_W, batch.begins_D)
    return Words(
        begins_W=begins_W,
        ends_W=np.flatnonzero(is_border[1:] & is_text) + 1,
        counts_D=np.diff(np.append(firsts, len(begins_W))),
        classes=classes,
    )


def lower(batch: TextBatch) -> TextBatch:
    """Returns the batch as `str.lower` spells each of its documents."""
    if not batch.content.isascii():
        places, characters = _characters(np.frombuffer(batch.content, np.uint8))
        places = places[_changes_in_lower_case()[np.minimum(characters, _TABLE_SIZE - 1)]]
        if len(places):
            changed = np.unique(np.searchsorted(batch.ends_D, places))
            return _lower_by_character(batch, set(changed.tolist()))
    return TextBatch(content=batch.content.lower(), begins_D=batch.begins_D, ends_D=batch.ends_D)


def classes_of(content: bytes) -> np.ndarray:
    """Returns the class of the character that each byte belongs to, uint8."""
    classes = np.frombuffer(content.translate(_class_of_bytes()), np.uint8)
    if content.isascii():
        return classes
    classes = classes.copy()
    values = np.frombuffer(content, np.uint8)
    places, characters = _characters(values)
    found = _class_table()[np.minimum(characters, _TABLE_SIZE - 1)]
    first = values[places]
    for byte, from_value in ((0, 0xC0), (1, 0xC0), (2, 0xE0), (3, 0xF0)):
        has_byte = first >= from_value
        classes[places[has_byte] + byte] = found[has_byte]
    return classes


def is_first_byte(content: bytes) -> np.ndarray:
    """Returns a bool for each byte: True if a character begins there."""
    return np.frombuffer(content, np.uint8) & 0xC0 != 0x80


def _lower_by_character(batch: TextBatch, changed: set[int]) -> TextBatch:
    documents = zip(batch.begins_D.tolist(), batch.ends_D.tolist(), strict=True)
    texts = [batch.content[begin:end] for begin, end in documents]
    return TextBatch.of_bytes(
        [
            text.decode().lower().encode() if i in changed else text.lower()
            for i, text in enumerate(texts)
        ]
    )


def _characters(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first byte and the code point of every character beyond ASCII."""
    places = np.flatnonzero(values >= 0xC0)
    padded = np.concatenate([values, np.zeros(_LONGEST_CHARACTER, np.uint8)])
    first, *others = (padded[places + i].astype(np.int32) for i in range(_LONGEST_CHARACTER))
    second, third, fourth = (other & 0x3F for other in others)
    two = (first & 0x1F) << 6 | second
    three = (first & 0x0F) << 12 | second << 6 | third
    four = (first & 0x07) << 18 | second << 12 | third << 6 | fourth
    return places, np.where(first < 0xE0, two, np.where(first < 0xF0, three, four))


@cache
def _class_table() -> np.ndarray:
    """The class of each code point; that of the last entry is the class of all beyond."""
    return np.array([_class_of(chr(point)) for point in range(_TABLE_SIZE)], dtype=np.uint8)


@cache
def _class_of_bytes() -> bytes:
    """The class of each byte that is a character of its own; others are overwritten."""
    return _class_table()[:256].tobytes()


@cache
def _changes_in_lower_case() -> np.ndarray:
    return np.array([chr(point).lower() != chr(point) for point in range(_TABLE_SIZE)])


def _class_of(character: str) -> int:
    if character.isspace():
        return SPACE
    return WORD if character.isalnum() or character == "_" else SYMBOL
