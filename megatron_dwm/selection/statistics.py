"""Cheap statistics of texts, by the name of their column: `tools/score_data.py`.

To add one, write a function from a `Texts` to one value a document, and a line in `STATISTICS`.
Where a statistic has no meaning, such as the mean length of no words, it is 0.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_dwm.selection.buckets import keys_of_words
from megatron_dwm.selection.words import (
    SYMBOL,
    WORD,
    TextBatch,
    Words,
    classes_of,
    is_first_byte,
    lower,
    split_words,
)


@dataclass(frozen=True)
class Texts:
    """The texts of D documents, and what several statistics need of them."""

    batch: TextBatch

    @cached_property
    def first_bytes(self) -> np.ndarray:
        """bool for each byte: True if a character begins there."""
        return is_first_byte(self.batch.content)

    @cached_property
    def characters_D(self) -> np.ndarray:
        """Characters of each document."""
        return self.count(self.first_bytes)

    @cached_property
    def lowered(self) -> TextBatch:
        """The texts in lower case."""
        return lower(self.batch)

    @cached_property
    def words(self) -> Words:
        """Words and runs of symbols of the lower-cased texts."""
        return split_words(self.lowered)

    def count(self, is_counted: np.ndarray) -> np.ndarray:
        """The number of bytes of each document for which `is_counted` is True."""
        before = np.concatenate([[0], np.cumsum(is_counted, dtype=np.int64)])
        return before[self.batch.ends_D] - before[self.batch.begins_D]

    def in_documents(self, values_W: np.ndarray) -> np.ndarray:
        """The sum over each document of a value for each of its words."""
        ends_D = np.cumsum(self.words.counts_D)
        before = np.concatenate([[0], np.cumsum(values_W, dtype=np.int64)])
        return before[ends_D] - before[ends_D - self.words.counts_D]


def length(texts: Texts) -> np.ndarray:
    """Characters."""
    return texts.characters_D


def type_token_ratio(texts: Texts) -> np.ndarray:
    """Distinct words / words, in lower case, where a word is a run of letters, digits and `_`.

    >>> type_token_ratio(Texts(TextBatch.of(["to be or not to be", "To"])))
    array([0.66666667, 1.        ])
    """
    words = texts.words
    is_word_W = words.classes_W == WORD
    document_W = np.repeat(np.arange(len(words.counts_D)), words.counts_D)
    keys_W = keys_of_words(texts.lowered.content, words.begins_W, words.ends_W)
    pairs = np.stack([document_W[is_word_W].astype(np.uint64), keys_W[is_word_W]])
    order = np.lexsort(pairs[::-1])
    pairs = pairs[:, order]
    is_new = np.ones(pairs.shape[1], dtype=bool)
    is_new[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)
    distinct_D = np.bincount(pairs[0, is_new].astype(np.int64), minlength=len(words.counts_D))
    return _ratio(distinct_D, texts.in_documents(is_word_W))


def symbol_share(texts: Texts) -> np.ndarray:
    """Characters that are neither white space, letters, digits nor `_`, / characters.

    >>> symbol_share(Texts(TextBatch.of(["a+b=c", "words"])))
    array([0.4, 0. ])
    """
    is_symbol = classes_of(texts.batch.content) == SYMBOL
    return _ratio(texts.count(is_symbol & texts.first_bytes), texts.characters_D)


def compression_ratio(texts: Texts) -> np.ndarray:
    """Bytes after zlib, level 6, / bytes of UTF-8: small for text that repeats itself."""
    batch = texts.batch
    sizes_D = batch.ends_D - batch.begins_D
    places = zip(batch.begins_D.tolist(), batch.ends_D.tolist(), strict=True)
    content = memoryview(batch.content)
    compressed = [len(zlib.compress(content[begin:end], 6)) for begin, end in places]
    return _ratio(np.array(compressed, dtype=np.int64), sizes_D)


def mean_word_length(texts: Texts) -> np.ndarray:
    """Characters of words / words, where a word is a run of letters, digits and `_`."""
    words = texts.words
    is_word_W = words.classes_W == WORD
    before = np.concatenate([[0], np.cumsum(is_first_byte(texts.lowered.content), dtype=np.int64)])
    sizes_W = before[words.ends_W] - before[words.begins_W]
    return _ratio(texts.in_documents(sizes_W * is_word_W), texts.in_documents(is_word_W))


Statistic = Callable[[Texts], np.ndarray]
STATISTICS: dict[str, Statistic] = {
    "length": length,
    "type_token_ratio": type_token_ratio,
    "symbol_share": symbol_share,
    "compression_ratio": compression_ratio,
    "mean_word_length": mean_word_length,
}


def _ratio(above_D: np.ndarray, below_D: np.ndarray) -> np.ndarray:
    return np.where(below_D > 0, above_D / np.maximum(below_D, 1), 0.0)
