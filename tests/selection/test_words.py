r"""Words against Python's own regular expression, and buckets against the published hash."""

from __future__ import annotations

import hashlib
import re
import sys

import numpy as np
import pytest

from megatron_dwm.selection import buckets, words
from megatron_dwm.selection.buckets import NO_BUCKET, BucketCache, buckets_of
from megatron_dwm.selection.words import TextBatch, lower, split_words

PATTERN = re.compile(r"\w+|[^\w\s]+")
TEXTS = [
    "",
    "   \n\t ",
    "Don't stop: it's 3.14, isn't_it?!",
    "\u00c9t\u00e9 \u0130stanbul \u039f\u0394\u039f\u03a3 \u03a3\u0391\u03a3 \u212a \u1e9e",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \U0001f600\U0001f468\u200d\U0001f469 \u2019s",
    "\x00\x1c\x1d\x85\u2028\u00a0\u3000 x\u0301 \u0663\u2167\u2460 \U0010ffff\U000e0100",
    "a" * 7 + " " + "b" * 8 + " " + "c" * 9 + " " + "d" * 64 + " " + "e" * 65 + " " + "f" * 500,
    "tight(brackets)and--dashes  double  spaces\nnew\nlines",
    "one",
]


def expected_words(text: str) -> list[str]:
    """As DSIR's code has them."""
    return PATTERN.findall(text.lower())


def published_bucket(text: str) -> int:
    """As DSIR's paper and code describe it."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10_000


def test_words_are_those_of_the_regular_expression() -> None:
    batch = lower(TextBatch.of(TEXTS))
    found = split_words(batch)
    spelled = [
        batch.content[begin:end].decode()
        for begin, end in zip(found.begins_W, found.ends_W, strict=True)
    ]
    assert spelled == [word for text in TEXTS for word in expected_words(text)]
    assert found.counts_D.tolist() == [len(expected_words(text)) for text in TEXTS]


def test_every_character_has_the_class_that_python_gives_it() -> None:
    points = [p for p in range(sys.maxunicode + 1) if not 0xD800 <= p < 0xE000]
    text = "".join(map(chr, points))
    classes = words.classes_of(text.encode())
    found = classes[words.is_first_byte(text.encode())]
    kinds = ((words.WORD, r"\w"), (words.SPACE, r"\s"), (words.SYMBOL, r"[^\w\s]"))
    expected = np.zeros(len(points), np.uint8)
    for kind, pattern in kinds:
        expected[[m.start() for m in re.finditer(pattern, text)]] = kind
    assert np.array_equal(found, expected)
    batch = lower(TextBatch.of([chr(p) for p in points[::7]]))
    assert batch.content.decode() == "".join(chr(p).lower() + "\n" for p in points[::7])


def test_known_buckets() -> None:
    # From `printf hello | sha256sum`, and so on, modulo 10,000.
    assert buckets_of([b"hello", b"hello world", b""]).tolist() == [7_620, 1_529, 6_549]
    for text in ("hello", "hello world", "", "\u00e9t\u00e9", "x" * 200):
        assert buckets_of([text.encode()]).tolist() == [published_bucket(text)]


@pytest.mark.parametrize("num_places", [1 << 14, 1 << 18])
def test_remembered_buckets(num_places: int) -> None:
    """Cold, warm, and with a table so small that entries are replaced all the time."""
    generator = np.random.default_rng(2)
    vocabulary = [f"w{i}" for i in range(4_000)]
    texts = [*TEXTS, *(" ".join(generator.choice(vocabulary, 900)) for _ in range(30)), ""]
    batch = lower(TextBatch.of(texts))
    cache = BucketCache(np.zeros(num_places, np.uint64))
    found = split_words(batch)
    for _ in range(2):
        counted = cache.count(batch, found)
        at = 0
        for text in texts:
            ours = expected_words(text)
            rows = counted[at : at + len(ours)]
            at += len(ours)
            pairs = [f"{a} {b}" for a, b in zip(ours[:-1], ours[1:], strict=True)]
            assert rows[:, 0].tolist() == list(map(published_bucket, ours))
            assert rows[:-1, 1].tolist() == list(map(published_bucket, pairs))
            assert not len(rows) or rows[-1, 1] == NO_BUCKET
    assert buckets.NUM_BUCKETS == 10_000
