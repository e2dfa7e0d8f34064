"""Cutting passages into rows of equal length for the model.

Passages have the special tokens around them that the documents of the training data have.

* `pack_dense`: passages, each ended by the end-of-document token, follow one another without gaps;
  row r holds the tokens r*S to r*S + S of that text, so every token but the very first is a label
  exactly once. The end of the last row is padding without loss.
* `row_of_last_word`: one passage a row, cut on the left to fit, padded on the right; only the
  tokens of the last word carry loss.

Cost: linear in the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_dwm.data.batch import NO_ROW, Batch

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Rows:
    """R rows of S + 1 tokens, which of the last S count, and where they come from."""

    text: np.ndarray
    """int32 [R, S + 1]"""
    mask: np.ndarray
    """bool [R, S]: whether token 1 to S of the row carries loss"""
    documents: np.ndarray
    """int64 [R]: number of the passage with most of the row's first S tokens"""

    def __len__(self) -> int:
        return len(self.documents)

    @staticmethod
    def stack(parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, in order."""
        return Rows(
            text=np.concatenate([part.text for part in parts]),
            mask=np.concatenate([part.mask for part in parts]),
            documents=np.concatenate([part.documents for part in parts]),
        )

    def batch(self, row_ids: Sequence[int], domains: Sequence[str], num_padding: int = 0) -> Batch:
        """The named rows, and `num_padding` rows without loss after them.

        Args:
            row_ids: at least one row.
            domains: the domain of each of `row_ids`; padding repeats the last one.
            num_padding: rows to add, so that all batches have one size.
        """
        ids = np.array([*row_ids, *[row_ids[-1]] * num_padding], dtype=np.int64)
        real = np.arange(len(ids)) < len(row_ids)
        text = torch.from_numpy(self.text[ids].astype(np.int64))
        return Batch(
            tokens_BS=text[:, :-1].contiguous(),
            labels_BS=text[:, 1:].contiguous(),
            loss_mask_BS=torch.from_numpy((self.mask[ids] & real[:, None]).astype(np.float32)),
            position_ids_BS=torch.arange(text.shape[1] - 1).repeat(len(ids), 1),
            sample_ids_B=torch.from_numpy(np.where(real, ids, NO_ROW)),
            document_ids_B=torch.from_numpy(np.where(real, self.documents[ids], NO_ROW)),
            domains=(*domains, *[domains[-1]] * num_padding),
        )


def pack_dense(
    passages: Iterable[tuple[int, Sequence[int]]], sequence_length: int, eod_id: int
) -> Rows:
    """The passages (number, token ids; each with at least one token) packed without gaps."""
    pieces, owners = [], []
    for number, ids in passages:
        pieces.append(np.array([*ids, eod_id], dtype=np.int32))
        owners.append(np.full(len(ids) + 1, number, dtype=np.int64))
    stream, owner = np.concatenate(pieces), np.concatenate(owners)
    num_rows = -(-(len(stream) - 1) // sequence_length)
    padded = np.full(num_rows * sequence_length + 1, eod_id, dtype=np.int32)
    padded[: len(stream)] = stream
    place = np.arange(num_rows)[:, None] * sequence_length + np.arange(sequence_length + 1)
    first = np.arange(num_rows) * sequence_length
    return Rows(
        text=padded[place],
        mask=place[:, 1:] < len(stream),
        documents=np.array([_most_frequent(owner[f : f + sequence_length]) for f in first]),
    )


def row_of_last_word(
    number: int, text: str, tokenizer: Tokenizer, sequence_length: int
) -> Rows | None:
    """The row of one passage, or None when no token of its last word can be a label.

    A label needs a token before it, so a passage of a single word that is a single token has none.
    White space at the end of the passage is no part of it.
    """
    passage = text.rstrip()
    words = passage.split()
    if not words:
        return None
    beginning = passage[: len(passage) - len(words[-1])].rstrip()
    ids = np.array([*tokenizer.around.before, *tokenizer.encode(passage)], dtype=np.int32)
    before = [*tokenizer.around.before, *tokenizer.encode(beginning)]
    start = max(1, _common_length(ids, before))
    if start >= len(ids):
        return None
    kept = ids[-(sequence_length + 1) :]
    start = max(1, start - (len(ids) - len(kept)))
    row = np.full(sequence_length + 1, tokenizer.eod_id, dtype=np.int32)
    row[: len(kept)] = kept
    label = np.arange(1, sequence_length + 1)
    mask = (label >= start) & (label < len(kept))
    return Rows(text=row[None], mask=mask[None], documents=np.array([number]))


def _common_length(ids: np.ndarray, before: Sequence[int]) -> int:
    """Tokens that the passage shares with its beginning encoded alone.

    They differ where a piece reaches over the border; the last word then starts at that piece.
    """
    shared = min(len(ids), len(before))
    different = np.flatnonzero(ids[:shared] != np.array(before[:shared], dtype=np.int32))
    return int(different[0]) if len(different) else shared


def _most_frequent(owner: np.ndarray) -> int:
    numbers, counts = np.unique(owner, return_counts=True)
    return int(numbers[np.argmax(counts)])
