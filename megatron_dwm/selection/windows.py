"""Documents as rows of tokens for a model: windows of its context, and batches of similar length.

A document longer than the context is cut into windows that follow each other without a gap. The
label of a window's last token is the first token of the next window, so windows share one token in
this sense and every token but a document's first is predicted once. Tokens of a window see nothing
of the windows before it.

Rows are padded on the right, which causal attention never sees. Windows are sorted by length, so
padding is little: a batch has at most `tokens` places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_dwm.data import Batch
from megatron_dwm.data.batch import NO_ROW
from megatron_dwm.selection.pool import Pool
from megatron_dwm.selection.select import Progress
from megatron_dwm.selection.tokens import SpanTokens, TokenSource
from megatron_dwm.selection.workers import Span, spans_of

BATCH_TOKENS = 1 << 12


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The W windows of consecutive documents, in order."""

    documents_W: np.ndarray
    """int64: number of the document"""
    begins_W: np.ndarray
    """int64: its first token among those of all documents"""
    lengths_W: np.ndarray
    """int64: tokens that the model reads"""
    labels_W: np.ndarray
    """int64: tokens that it predicts: as many, or one less at the end of a document"""


def windows_of(lengths_D: np.ndarray, context_tokens: int) -> Windows:
    """Cut documents of these lengths; a document without tokens has no window."""
    counts_D = -(-lengths_D // context_tokens)
    documents_W = np.repeat(np.arange(len(lengths_D)), counts_D)
    number_W = np.arange(len(documents_W)) - (np.cumsum(counts_D) - counts_D)[documents_W]
    first_W = number_W * context_tokens
    left_W = lengths_D[documents_W] - first_W
    lengths_W = np.minimum(left_W, context_tokens)
    return Windows(
        documents_W=documents_W,
        begins_W=(np.cumsum(lengths_D) - lengths_D)[documents_W] + first_W,
        lengths_W=lengths_W,
        labels_W=np.minimum(left_W - 1, lengths_W),
    )


def batches_of(lengths_W: np.ndarray, tokens: int = BATCH_TOKENS) -> Iterator[np.ndarray]:
    """Yields the numbers of windows for each batch, longest windows first."""
    order_W = np.argsort(-lengths_W, kind="stable")
    while len(order_W):
        rows = max(1, tokens // int(lengths_W[order_W[0]]))
        yield order_W[:rows]
        order_W = order_W[rows:]


def batch_of(
    ids: np.ndarray, windows: Windows, chosen_B: np.ndarray, *, tokens_are_units: bool = False
) -> Batch:
    """Returns the windows with these numbers as rows.

    ids: the tokens of all documents. Each window is a unit, or each of its tokens.
    """
    lengths_B = windows.lengths_W[chosen_B]
    places_S = np.arange(lengths_B.max())
    is_token_BS = places_S < lengths_B[:, None]
    is_label_BS = places_S < windows.labels_W[chosen_B][:, None]
    at_BS = windows.begins_W[chosen_B][:, None] + places_S
    tokens_BS = np.where(is_token_BS, ids[np.where(is_token_BS, at_BS, 0)], 0)
    labels_BS = np.where(is_label_BS, ids[np.where(is_label_BS, at_BS + 1, 0)], 0)
    documents_B = torch.from_numpy(windows.documents_W[chosen_B])
    return Batch(
        tokens_BS=torch.from_numpy(tokens_BS.astype(np.int64)),
        labels_BS=torch.from_numpy(labels_BS.astype(np.int64)),
        loss_mask_BS=torch.from_numpy(is_label_BS.astype(np.float32)),
        position_ids_BS=torch.from_numpy(places_S).repeat(len(chosen_B), 1),
        sample_ids_B=torch.full((len(chosen_B),), NO_ROW),
        document_ids_U=documents_B,
        domains=("",) * len(chosen_B),
        units_BS=None if tokens_are_units else torch.from_numpy(is_token_BS.astype(np.int64) - 1),
        tokens_are_units=tokens_are_units,
    )


@dataclass(frozen=True, kw_only=True)
class ScannedSpan:
    """Consecutive documents and their windows."""

    span: Span
    tokens: SpanTokens
    windows: Windows

    def batches(self, *, tokens_are_units: bool = False) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yields numbers of windows, and the windows as rows."""
        for chosen_B in batches_of(self.windows.lengths_W):
            yield (
                chosen_B,
                batch_of(
                    self.tokens.ids, self.windows, chosen_B, tokens_are_units=tokens_are_units
                ),
            )


def scan(
    pool: Pool, vocab_size: int, vocabulary: str, context_tokens: int, progress: Progress
) -> Iterator[ScannedSpan]:
    """Yields all documents, in order, half a million tokens at a time.

    vocab_size, vocabulary: number of ids that the model knows, and its name for the message.
    Raises `UserError` for an id that it does not know.
    """
    source, itemsize = TokenSource.of(pool), pool.dataset.header.itemsize
    with progress(pool.dataset.paths.bin.stat().st_size) as advance:
        for span in spans_of(pool.tokens_D):
            tokens = source.read(span, vocab_size, vocabulary)
            windows = windows_of(tokens.lengths_D, context_tokens)
            yield ScannedSpan(span=span, tokens=tokens, windows=windows)
            advance(len(tokens.ids) * itemsize, span.end - span.begin)
