"""Texts of an indexed dataset, decoded from its tokens.

A document of several sequences is their texts, joined by line ends. Special tokens have no text.
The tokenizer has to be that of the data: the sidecar says which it was; without a sidecar, each id
has to be one of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.sidecar_format import (
    TOKENIZER_KIND,
    TOKENIZER_SHA256,
    VOCAB_SIZE,
    facts_in,
    special_tokens,
)
from megatron_dwm.preprocess.messages import warn
from megatron_dwm.selection.pool import Pool
from megatron_dwm.selection.tokens import TokenSource
from megatron_dwm.selection.words import TextBatch
from megatron_dwm.selection.workers import Span

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import BatchDecoder, Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """What a process needs to read texts."""

    tokens: TokenSource
    tokenizer_model: str
    tokenizer_kind: str
    has_special_tokens: bool

    def open(self) -> Callable[[Span], TextBatch]:
        """Load the tokenizer; returns the function that reads the texts of some documents."""
        from megatron_dwm.tokenizer import BatchDecoder

        tokenizer = self._tokenizer()
        decoder = BatchDecoder(tokenizer)
        return lambda span: self._read(span, decoder, tokenizer)

    def as_decoded(self) -> Callable[[str], str]:
        """Load the tokenizer; returns the function that gives a text as it would be read."""
        tokenizer = self._tokenizer()
        return lambda text: tokenizer.decode(tokenizer.encode(text))

    def _tokenizer(self) -> Tokenizer:
        from megatron_dwm.tokenizer import build_tokenizer

        return build_tokenizer(
            self.tokenizer_kind,
            self.tokenizer_model,
            include_special_tokens=self.has_special_tokens,
        )

    def _read(self, span: Span, decoder: BatchDecoder, tokenizer: Tokenizer) -> TextBatch:
        found = self.tokens.read(span, tokenizer.vocab_size, self.tokenizer_model)
        if not len(found.ids):
            return TextBatch.of_bytes([b""] * (span.end - span.begin))
        decoded = decoder.decode(found.ids, found.ends_S)
        return _by_document(decoded.content, decoded.ends, found.sequences_D)


def open_texts(pool: Pool, tokenizer_model: str) -> TextSource:
    """Check that `pool` was made with this tokenizer, and return how to read its texts.

    Raises `UserError` if the tokenizer cannot be read, or if it is another one.
    """
    from megatron_dwm.tokenizer import BatchDecoder, build_tokenizer, open_tokenizer

    facts = {} if pool.sidecar is None else facts_in(pool.sidecar.schema_arrow)
    has_special_tokens = any(special_tokens(facts))
    tokenizer = open_tokenizer(tokenizer_model)
    _require_same(pool, facts, tokenizer, tokenizer_model)
    kind = facts.get(TOKENIZER_KIND, tokenizer.kind)
    tokenizer = build_tokenizer(kind, tokenizer_model, include_special_tokens=has_special_tokens)
    if not BatchDecoder(tokenizer).is_fast:
        warn(
            f"{tokenizer_model}: its pieces are spelled in an unknown way; the tokenizer's library "
            "decodes, several times slower"
        )
    return TextSource(
        tokens=TokenSource.of(pool),
        tokenizer_model=tokenizer_model,
        tokenizer_kind=kind,
        has_special_tokens=has_special_tokens,
    )


def _require_same(
    pool: Pool, facts: dict[str, str], tokenizer: Tokenizer, tokenizer_model: str
) -> None:
    sha256 = facts.get(TOKENIZER_SHA256, tokenizer.sha256)
    vocab_size = facts.get(VOCAB_SIZE, str(tokenizer.vocab_size))
    if (sha256, vocab_size) != (tokenizer.sha256, str(tokenizer.vocab_size)):
        raise UserError(
            f"--tokenizer {tokenizer_model}: {tokenizer.sha256[:12]} with {tokenizer.vocab_size} "
            f"pieces, but {pool.dataset.paths.sidecar} says that the data was made with "
            f"{sha256[:12]} of {vocab_size} pieces; give that one"
        )


def _by_document(content: bytes, ends_S: np.ndarray, num_sequences_D: np.ndarray) -> TextBatch:
    """The texts of sequences as those of documents, with an empty one for each without sequences.

    A document without sequences gets a line end of its own, so that every document ends with one.
    """
    empty_D = num_sequences_D == 0
    last_D = np.cumsum(num_sequences_D) - 1
    line_ends_D = np.where(last_D >= 0, ends_S[np.maximum(last_D, 0)], -1)
    shift_D = np.cumsum(empty_D)
    ends_D = line_ends_D + shift_D
    begins_D = np.concatenate([[0], ends_D[:-1] + 1])
    if empty_D.any():
        at = line_ends_D[empty_D] + 1
        padded = np.insert(np.frombuffer(content, np.uint8), at, ord("\n"))
        content = padded.tobytes()
    return TextBatch(content=content, begins_D=begins_D, ends_D=ends_D)
