"""Texts of documents, decoded from the tokens that the run trained on; never imports torch.

The tokenizer has to be that of the data, by the digest in the sidecar. A document of several
sequences is their texts, joined by line ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.sidecar_format import (
    TOKENIZER_KIND,
    TOKENIZER_SHA256,
    facts_in,
    special_tokens,
)
from megatron_dwm.report.corpus import Corpus, Prefix

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class DocumentTexts:
    """Reads documents of a corpus; `notes` says which cannot be read, and why."""

    corpus: Corpus
    tokenizer: Tokenizer | None
    notes: Sequence[str]

    @staticmethod
    def open(corpus: Corpus) -> DocumentTexts:
        """Open the corpus's tokenizer, if it is still the one of the data."""
        notes: list[str] = []
        tokenizer = _tokenizer(corpus, notes)
        return DocumentTexts(corpus=corpus, tokenizer=tokenizer, notes=notes)

    def of(self, document: int, max_tokens: int) -> str | None:
        """Returns the text of a document's first tokens; None if it cannot be read."""
        located = self.corpus.locate(document)
        if self.tokenizer is None or located is None or located[0].header is None:
            return None
        prefix, number = located
        return "\n".join(
            self._decoded(ids) for ids in _sequences(prefix, number, max_tokens)
        ).rstrip(_REPLACEMENT)

    def tokens(self, ids: Sequence[int]) -> list[str] | None:
        """Returns the text of each token, which together are that of all; None without a tokenizer.

        The text of a character whose bytes are several tokens belongs to the last of them.
        """
        if self.tokenizer is None:
            return None
        found, before, read = [], 0, 0
        for end in range(1, len(ids) + 1):
            known, text = (self._decoded(ids[before:stop]) for stop in (read, end))
            whole = len(text) >= len(known) and not text.endswith(_REPLACEMENT)
            found.append(text[len(known) :] if whole else "")
            if whole:
                before, read = read, end
        return found

    def _decoded(self, ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        size = self.tokenizer.vocab_size
        return self.tokenizer.decode([token for token in ids if 0 <= token < size])


def _tokenizer(corpus: Corpus, notes: list[str]) -> Tokenizer | None:
    from megatron_dwm.tokenizer import build_tokenizer, open_tokenizer

    if not any(prefix.header is not None for prefix in corpus.prefixes):
        return None
    if corpus.tokenizer is None:
        notes.append("config.yaml names no tokenizer (data.tokenizer): documents have no text")
        return None
    sidecars = [p.sidecar.schema_arrow for p in corpus.prefixes if p.sidecar is not None]
    facts = facts_in(sidecars[0]) if sidecars else {}
    try:
        found = open_tokenizer(corpus.tokenizer)
        if facts.get(TOKENIZER_SHA256, found.sha256) != found.sha256:
            notes.append(
                f"{corpus.tokenizer} is not the tokenizer of the data, which has the digest "
                f"{facts[TOKENIZER_SHA256][:12]}: documents have no text"
            )
            return None
        kind, special = facts.get(TOKENIZER_KIND, found.kind), any(special_tokens(facts))
        return build_tokenizer(kind, corpus.tokenizer, include_special_tokens=special)
    except (UserError, OSError) as error:
        notes.append(f"the tokenizer cannot be read ({error}): documents have no text")
        return None


def _sequences(prefix: Prefix, document: int, max_tokens: int) -> list[list[int]]:
    """Returns the ids of a document's sequences, of its first `max_tokens` tokens."""
    header = prefix.header
    assert header is not None
    first, stop = _numbers(prefix, header.borders_at, np.int64, document, 2)
    found: list[list[int]] = []
    for sequence in range(int(first), int(stop)):
        if max_tokens <= 0:
            break
        [length] = _numbers(prefix, header.lengths_at, np.int32, sequence, 1)
        [offset] = _numbers(prefix, header.offsets_at, np.int64, sequence, 1)
        count = min(int(length), max_tokens)
        ids = np.fromfile(prefix.paths.bin, header.dtype, count, offset=int(offset))
        found.append(ids.tolist())
        max_tokens -= count
    return found


def _numbers(
    prefix: Prefix, at: int, dtype: type[np.signedinteger], first: int, count: int
) -> np.ndarray:
    """Read some numbers of the index, from number `first` after byte `at`."""
    size = np.dtype(dtype).itemsize
    return np.fromfile(prefix.paths.idx, dtype, count, offset=at + size * first)
