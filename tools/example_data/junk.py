"""Mixes junk into a corpus, so that a known part of its text is worthless.

Three kinds in equal parts, each a domain of its own:

    shuffled_words      the words of real documents in random order: right words, no order
    random_words        words drawn uniformly from the corpus's distinct words: no frequencies
    random_characters   printable ASCII characters with spaces: no words

The real documents stay as they are; the order of all documents is pseudo-random. The result
depends only on the input, the fraction and the seed. Cost: linear; the corpus is held in memory.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import new_outputs
from megatron_dwm.preprocess.read.inputs import find_inputs
from megatron_dwm.preprocess.read.parsing import parse_record, text_of
from megatron_dwm.preprocess.read.texts import read_lines_of
from megatron_dwm.preprocess.records import BadRecord

JUNK_DOMAINS = {
    "shuffled_words": "JunkShuffledWords",
    "random_words": "JunkRandomWords",
    "random_characters": "JunkRandomCharacters",
}
"""The `domain` of each kind, and its `meta.redpajama_set_name`."""

_LONGEST_DOCUMENT_BYTES = 8192  # no single junk document dominates a batch
_WORDS_DRAWN = 256
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + 18 * " "  # 1 in 6 a space


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    lines: list[bytes]
    """records as they were, without line ends"""
    texts: list[str]
    """their texts"""


@dataclass(frozen=True, kw_only=True)
class JunkSummary:
    """The parts of a mixed corpus; bytes are of UTF-8 text."""

    real_documents: int
    real_bytes: int
    junk_documents: int
    junk_bytes: int


def add_junk(source: str, output: Path, *, fraction: float, seed: int) -> JunkSummary:
    """Write the corpus `source` with junk, `fraction` of the text bytes, to JSON Lines `output`.

    Raises `UserError` for a fraction outside (0, 1), a bad record or an output that exists.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--fraction {fraction}: expected a number between 0 and 1 (both excluded)")
    if output.suffix != ".jsonl":
        raise UserError(f"{output}: the output is JSON Lines; end its name with .jsonl")
    find_inputs([source])
    with new_outputs([output]) as partials:
        corpus = _read(source)
        real_bytes = sum(_size_bytes(text) for text in corpus.texts)
        kind_bytes = round(real_bytes * fraction / (1 - fraction) / len(JUNK_DOMAINS))
        generator = random.Random(seed)
        junk = _junk_rows(corpus.texts, kind_bytes, generator)
        rows = corpus.lines + [json.dumps(row, ensure_ascii=False).encode("utf-8") for row in junk]
        generator.shuffle(rows)
        partials[output].write_bytes(b"".join(row + b"\n" for row in rows))
    return JunkSummary(
        real_documents=len(corpus.lines),
        real_bytes=real_bytes,
        junk_documents=len(junk),
        junk_bytes=len(JUNK_DOMAINS) * kind_bytes,
    )


def _read(source: str) -> _Corpus:
    lines: list[bytes] = []
    texts: list[str] = []
    for where, line in read_lines_of([source]):
        try:
            texts.append(text_of(parse_record(line), "text"))
        except BadRecord as error:
            raise UserError(f"{where}: {error}") from None
        lines.append(line.strip())
    if not any(text.split() for text in texts):
        raise UserError(f"{source}: no document has any words to make junk of")
    return _Corpus(lines=lines, texts=texts)


def _junk_rows(
    texts: Sequence[str], kind_bytes: int, generator: random.Random
) -> list[dict[str, object]]:
    """Make documents with `kind_bytes` bytes of text for each kind."""
    with_words = [text for text in texts if text.split()]
    vocabulary = sorted({word for text in with_words for word in text.split()})

    def shuffled_words() -> str:
        words = generator.choice(with_words).split()
        return " ".join(generator.sample(words, len(words)))

    def random_words() -> str:
        return " ".join(generator.choices(vocabulary, k=_WORDS_DRAWN))

    def random_characters() -> str:
        return "".join(generator.choices(_CHARACTERS, k=_LONGEST_DOCUMENT_BYTES))

    makers = (shuffled_words, random_words, random_characters)
    rows: list[dict[str, object]] = []
    for (domain, set_name), make in zip(JUNK_DOMAINS.items(), makers, strict=True):
        for text in _documents(make, kind_bytes, with_words, generator):
            meta = {"redpajama_set_name": set_name}
            rows.append({"text": text, "meta": meta, "source": "add_junk", "domain": domain})
    return rows


def _documents(
    make: Callable[[], str], total_bytes: int, models: Sequence[str], generator: random.Random
) -> list[str]:
    """Make texts of `total_bytes` together, each about as long as some real document."""
    documents = []
    while total_bytes > 0:
        model_bytes = _size_bytes(generator.choice(models))
        wanted_bytes = min(model_bytes, _LONGEST_DOCUMENT_BYTES, total_bytes)
        text = make()
        while _size_bytes(text) < wanted_bytes:
            text += " " + make()
        documents.append(_cut(text, wanted_bytes))
        total_bytes -= wanted_bytes
    return documents


def _cut(text: str, num_bytes: int) -> str:
    """The first `num_bytes` bytes; a character that the cut would split becomes spaces."""
    kept = text.encode("utf-8")[:num_bytes].decode("utf-8", "ignore")
    return kept + " " * (num_bytes - _size_bytes(kept))


def _size_bytes(text: str) -> int:
    return len(text.encode("utf-8"))
