"""DSIR (Xie et al. 2023): documents drawn by how much more likely the target makes their words.

A text is lower-cased and split into words (words.py). Words and pairs of neighbors are hashed into
10,000 buckets (buckets.py). With p the shares of the buckets in all n-grams of a corpus, a document
has the log-weight

    sum over its n-grams of  log(p_target[bucket] + 1e-8) - log(p_raw[bucket] + 1e-8)

and documents of fewer than 100 words are left out. All this is as in p-lambda/dsir,
data_selection/hashed_ngram_dsir.py at 4802a1c, with its default options. Its code fits p_raw on the
first 10^9 n-grams or so; here it is all of them, or, beyond 2^29 tokens, those of batches at equal
distances that have about as many tokens. Its budget is a number of documents, ours of tokens. It
reads texts; ours are decoded from ids, so the target is encoded and decoded, too: otherwise what
the tokenizer normalizes, or has no piece for, would tell the target from all documents.

Cost: the texts are decoded and hashed once. A temporary file, which has no name, keeps the buckets
of the batches that p_raw is fitted on: four bytes for each word, 2 GB at most.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.read.inputs import find_inputs
from megatron_dwm.preprocess.read.texts import read_texts
from megatron_dwm.selection.buckets import NO_BUCKET, NUM_BUCKETS, NUM_PLACES, BucketCache
from megatron_dwm.selection.choice import Scores
from megatron_dwm.selection.pool import Pool
from megatron_dwm.selection.select import Progress
from megatron_dwm.selection.texts import TextSource, open_texts
from megatron_dwm.selection.words import TextBatch, lower, split_words
from megatron_dwm.selection.workers import Span, map_spans, spans_of

SMOOTHING = 1e-8
MIN_WORDS = 100
_FIT_TOKENS = 1 << 29
_TARGET_CHARACTERS = 1 << 20
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """The buckets of a batch of documents."""

    counts_D: np.ndarray
    """int64: words of each document"""
    buckets_W2: np.ndarray
    """uint16: of each word and of the pair that it begins, or `NO_BUCKET`"""


@dataclass(frozen=True, kw_only=True)
class HashWork:
    """Hashes the documents of a dataset."""

    source: TextSource
    table: Any
    """the cache's memory, which the processes share"""

    def build(self) -> Callable[[Span], Hashed]:
        """Open the texts."""
        read = self.source.open()
        cache = BucketCache(np.frombuffer(self.table, np.uint64))
        return lambda span: hash_texts(read(span), cache)


@dataclass(frozen=True, kw_only=True)
class DsirScores:
    """`select_data.py dsir`."""

    target: str
    tokenizer: str
    min_words: int = MIN_WORDS
    num_workers: int = 1
    fit_tokens: int = _FIT_TOKENS
    name = "dsir"

    def options(self) -> dict[str, Any]:
        """The target and the tokenizer by their contents, and the shortest document."""
        from megatron_dwm.tokenizer import open_tokenizer

        files = find_inputs([self.target])
        if any(file.is_hub for file in files):
            raise UserError(f"--target {self.target}: expected a file; download it first")
        return {
            "target": self.target,
            "target_sha256": [_sha256(Path(file.name)) for file in files],
            "tokenizer_sha256": open_tokenizer(self.tokenizer).sha256,
            "min_words": self.min_words,
        }

    def scores(self, pool: Pool, progress: Progress, scratch: Path) -> Scores:
        """Log-weights. Raises `UserError` for another tokenizer, and a target without words."""
        source = open_texts(pool, self.tokenizer)
        # A shared array: an n-gram is hashed by one of the processes.
        table = get_context("spawn").RawArray("Q", NUM_PLACES)
        cache = BucketCache(np.frombuffer(table, np.uint64))
        target = self._target_shares(cache, source.as_decoded())
        work = HashWork(source=source, table=table)
        weights_D = np.zeros(pool.num_documents)
        words_D = np.zeros(pool.num_documents, dtype=np.int64)
        spans = spans_of(pool.tokens_D)
        step = max(1, -(-int(pool.tokens_D.sum()) // self.fit_tokens))
        fitted, others = spans[::step], [s for i, s in enumerate(spans) if i % step]
        with (
            progress(pool.dataset.paths.bin.stat().st_size) as advance,
            tempfile.TemporaryFile(dir=scratch) as file,
        ):

            def hash_all(chosen: list[Span]) -> Iterator[tuple[slice, Hashed]]:
                results = map_spans(work, chosen, self.num_workers)
                for span, hashed in zip(chosen, results, strict=True):
                    place = slice(span.begin, span.end)
                    words_D[place] = hashed.counts_D
                    yield place, hashed
                    num_tokens = int(pool.tokens_D[place].sum())
                    advance(num_tokens * pool.dataset.header.itemsize, span.end - span.begin)

            counts = np.zeros(NUM_BUCKETS + 1, dtype=np.int64)
            for _, hashed in hash_all(fitted):
                counts += np.bincount(hashed.buckets_W2.ravel(), minlength=NUM_BUCKETS + 1)
                file.write(hashed.buckets_W2.tobytes())
            log_ratios = log_ratios_of(target, shares_of(counts))
            file.seek(0)
            for span in fitted:
                place = slice(span.begin, span.end)
                weights_D[place] = log_weights(_read_back(file, words_D[place]), log_ratios)
            for place, hashed in hash_all(others):
                weights_D[place] = log_weights(hashed, log_ratios)
        return Scores(
            values_D=weights_D,
            eligible_D=(pool.tokens_D > 0) & (words_D >= self.min_words),
            eligible_words=f"documents of at least {self.min_words} words",
        )

    def _target_shares(self, cache: BucketCache, decoded: Callable[[str], str]) -> np.ndarray:
        counts = np.zeros(NUM_BUCKETS + 1, dtype=np.int64)
        for texts in _batches(map(decoded, read_texts([self.target], "text"))):
            hashed = hash_texts(TextBatch.of(texts), cache)
            counts += np.bincount(hashed.buckets_W2.ravel(), minlength=NUM_BUCKETS + 1)
        if not counts[:NUM_BUCKETS].any():
            raise UserError(f"--target {self.target}: no text with a word in it")
        return shares_of(counts)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def hash_texts(batch: TextBatch, cache: BucketCache) -> Hashed:
    """Returns the buckets of the n-grams of a batch."""
    lowered = lower(batch)
    words = split_words(lowered)
    return Hashed(counts_D=words.counts_D, buckets_W2=cache.count(lowered, words))


def shares_of(counts: np.ndarray) -> np.ndarray:
    """The share of each bucket in all n-grams; `counts` has `NO_BUCKET` as its last entry."""
    return counts[:NO_BUCKET] / max(int(counts[:NO_BUCKET].sum()), 1)


def log_ratios_of(target: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """The log-ratio of each bucket's smoothed shares, and 0 for `NO_BUCKET`."""
    return np.append(np.log(target + SMOOTHING) - np.log(raw + SMOOTHING), 0.0)


def log_weights(hashed: Hashed, log_ratios: np.ndarray) -> np.ndarray:
    """The sum of each document's log-ratios."""
    of_words, of_pairs = (log_ratios.take(hashed.buckets_W2[:, i]) for i in range(2))
    sums_W = of_words + of_pairs
    weights_D = np.zeros(len(hashed.counts_D))
    has_words = hashed.counts_D > 0
    if has_words.any():
        begins = (np.cumsum(hashed.counts_D) - hashed.counts_D)[has_words]
        weights_D[has_words] = np.add.reduceat(sums_W, begins)
    return weights_D


def _read_back(file: BinaryIO, counts_D: np.ndarray) -> Hashed:
    size_bytes = 4 * int(counts_D.sum())
    buckets = np.frombuffer(file.read(size_bytes), np.uint16)
    return Hashed(counts_D=counts_D, buckets_W2=buckets.reshape(-1, 2))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= _TARGET_CHARACTERS:
            yield held
            held, size = [], 0
    yield held
