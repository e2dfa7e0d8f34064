"""The bucket of every word and pair of words: DSIR's hash, SHA-256 of the UTF-8 modulo 10,000.

SHA-256 takes half a microsecond, so it is computed once for each n-gram of a large direct-mapped
cache. Its key is a 64-bit number made of the n-gram's bytes; its place is the key's lowest bits; a
later n-gram takes the place of an earlier one. Two n-grams have the same key with a probability of
2^-64. The cost is a gather for each n-gram that is known, and a microsecond for one that is not.

An entry is one aligned number, which processors write at once: the key without its 14 lowest bits,
which the place gives, and the bucket. So several processes may share a table without a lock.
"""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_dwm.selection.words import TextBatch, Words

NUM_BUCKETS = 10_000
NO_BUCKET = NUM_BUCKETS
"""stands for the pair that the last word of a document does not begin"""

NUM_PLACES = 1 << 24
"""128 MiB, for all workers together"""
_BUCKET_BITS = 14
_BUCKET_MASK = np.uint64((1 << _BUCKET_BITS) - 1)
_SPACE = ord(" ")
_WORD_BYTES = 8
_LONGEST_WORD = 64
_DIGEST_WORDS = 16
_POWERS = np.array([pow(1 << 16, 15 - i, NUM_BUCKETS) for i in range(_DIGEST_WORDS)], np.int64)
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(_WORD_BYTES + 1)], np.uint64)
_ODD = [np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)]
_ONE_WORD = np.uint64(0x5851F42D4C957F2D)


def buckets_of(ngrams: list[bytes]) -> np.ndarray:
    """Returns the bucket of each n-gram, its words joined by single spaces, by the hash itself.

    >>> buckets_of([b"the", b"the cat"])
    array([8288,  143], dtype=uint16)
    """
    sha256 = hashlib.sha256
    digests = b"".join([sha256(ngram).digest() for ngram in ngrams])
    numbers = np.frombuffer(digests, ">u2").reshape(-1, _DIGEST_WORDS).astype(np.int64)
    return (numbers @ _POWERS % NUM_BUCKETS).astype(np.uint16)


class BucketCache:
    """Buckets of n-grams, remembered."""

    def __init__(self, table: np.ndarray) -> None:
        """Use `table`, uint64, which is zero or has been used before; its size is a power of two.

        It is at least 2^14, so that the place gives the bits of the key that an entry lacks.
        """
        assert len(table) & (len(table) - 1) == 0
        assert len(table) > _BUCKET_MASK
        self._table = table
        self._mask = np.uint64(len(table) - 1)

    def count(self, batch: TextBatch, words: Words) -> np.ndarray:
        """Returns the buckets of each word and of the pair that it begins, uint16 [W, 2].

        The pair is `NO_BUCKET` for the last word of a document.
        """
        found = np.full((len(words.begins_W), 2), NO_BUCKET, dtype=np.uint16)
        if not len(found):
            return found
        keys_W = keys_of_words(batch.content, words.begins_W, words.ends_W)
        found[:, 0] = self._look_up(keys_W ^ _ONE_WORD, batch.content, words, pairs=False)
        # Pairs over the border of two documents are looked up, too, and dropped: they are few, and
        # to leave them out costs a copy of all others.
        pairs = _mix(keys_W[:-1] * _ODD[0] + keys_W[1:])
        found[:-1, 1] = self._look_up(pairs, batch.content, words, pairs=True)
        found[np.cumsum(words.counts_D)[words.counts_D > 0] - 1, 1] = NO_BUCKET
        return found

    def _look_up(
        self, keys_N: np.ndarray, content: bytes, words: Words, *, pairs: bool
    ) -> np.ndarray:
        """Returns the buckets of the n-grams that begin with each word and have these keys."""
        places_N = (keys_N & self._mask).view(np.int64)
        entries_N = self._table.take(places_N)
        missing = np.flatnonzero((entries_N ^ keys_N) > _BUCKET_MASK)
        entries_N &= _BUCKET_MASK
        found_N = entries_N.astype(np.uint16)
        if len(missing):
            keys, first, number = np.unique(keys_N[missing], return_index=True, return_inverse=True)
            chosen = missing[first]
            buckets = buckets_of(_spell(content, words, chosen, pairs=pairs))
            found_N[missing] = buckets[number]
            self._table[places_N[chosen]] = keys & ~_BUCKET_MASK | buckets
        return found_N


def _spell(content: bytes, words: Words, first_N: np.ndarray, *, pairs: bool) -> list[bytes]:
    """The bytes of the n-grams that begin with these words; a pair is joined by a space."""
    begins_N, ends_N = words.begins_W[first_N], words.ends_W[first_N]
    if not pairs:
        rows = zip(begins_N.tolist(), ends_N.tolist(), strict=True)
        return [content[begin:end] for begin, end in rows]
    nexts_N, lasts_N = words.begins_W[first_N + 1], words.ends_W[first_N + 1]
    rows = zip(begins_N.tolist(), lasts_N.tolist(), strict=True)
    spelled = [content[begin:end] for begin, end in rows]
    is_space_N = (nexts_N - ends_N == 1) & (np.frombuffer(content, np.uint8)[ends_N] == _SPACE)
    other = np.flatnonzero(~is_space_N)
    sizes, skipped = (ends_N - begins_N)[other].tolist(), (nexts_N - begins_N)[other].tolist()
    for i, size, skip in zip(other.tolist(), sizes, skipped, strict=True):
        whole = spelled[i]
        spelled[i] = whole[:size] + b" " + whole[skip:]
    return spelled


def keys_of_words(content: bytes, begins_W: np.ndarray, ends_W: np.ndarray) -> np.ndarray:
    """Returns a 64-bit number for each word, from all its bytes."""
    padded = content + bytes(_WORD_BYTES)
    # The eight bytes from every place on, as one number.
    eight = np.ndarray((len(content) + 1,), np.dtype("<u8"), padded, strides=(1,))
    sizes_W = ends_W - begins_W
    keys_W = eight[begins_W] & _MASKS[np.minimum(sizes_W, _WORD_BYTES)]
    keys_W ^= sizes_W.astype(np.uint64) * _ODD[1]
    longer = np.flatnonzero(sizes_W > _WORD_BYTES)
    for at in range(_WORD_BYTES, _LONGEST_WORD, _WORD_BYTES):
        longer = longer[sizes_W[longer] > at]
        part = eight[begins_W[longer] + at] & _MASKS[np.minimum(sizes_W[longer] - at, _WORD_BYTES)]
        keys_W[longer] = _mix(keys_W[longer]) ^ part
    for i in longer[sizes_W[longer] > _LONGEST_WORD].tolist():
        word = content[begins_W[i] : ends_W[i]]
        digest = hashlib.blake2b(word, digest_size=_WORD_BYTES).digest()
        keys_W[i] = int.from_bytes(digest, "little")
    return _mix(keys_W)


def _mix(keys: np.ndarray) -> np.ndarray:
    """Returns other numbers, one to one; each bit depends on all 64 bits (splitmix64)."""
    mixed = keys + _ODD[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _ODD[1]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _ODD[2]
    return mixed ^ (mixed >> np.uint64(31))
