"""Packs passages into rows of equal length.

Passages have the same special tokens around them as the documents of the training data.

* `pack_dense`: passages follow one another without gaps, each with an end-of-document token. Row r
  has the tokens r*S to r*S + S of that text, so every token but the very first is a label exactly
  once. The end of the last row is padding without loss.
* `pack_last_word`: one passage per row, cut on the left to fit, padded on the right. Only the
  tokens of the last word count in the loss.

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
class PackedSequences:
    """R rows of S + 1 tokens, which of the last S count in the loss, and their passages."""

    text: np.ndarray
    """int32 [R, S + 1]"""
    mask: np.ndarray
    """bool [R, S]: true where token 1 to S of the row counts in the loss"""
    documents: np.ndarray
    """int64 [R]: number of the passage with most of the row's first S tokens"""

    def __len__(self) -> int:
        return len(self.documents)

    @staticmethod
    def stack(parts: Sequence[PackedSequences]) -> PackedSequences:
        """Returns the rows of all parts, in order."""
        return PackedSequences(
            text=np.concatenate([part.text for part in parts]),
            mask=np.concatenate([part.mask for part in parts]),
            documents=np.concatenate([part.documents for part in parts]),
        )

    def batch(self, row_ids: Sequence[int], domains: Sequence[str], num_padding: int = 0) -> Batch:
        """Returns these rows, and `num_padding` rows without loss after them.

        Args:
            row_ids: at least one row.
            domains: the domain of each of `row_ids`; padding repeats the last one.
            num_padding: rows to add, so that all batches have the same size.
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
) -> PackedSequences:
    """Pack passages (number, token ids; each with at least one token) without gaps."""
    pieces, owners = [], []
    for number, ids in passages:
        pieces.append(np.array([*ids, eod_id], dtype=np.int32))
        owners.append(np.full(len(ids) + 1, number, dtype=np.int64))
    stream, owner = np.concatenate(pieces), np.concatenate(owners)
    num_rows = -(-(len(stream) - 1) // sequence_length)
    padded = np.full(num_rows * sequence_length + 1, eod_id, dtype=np.int32)
    padded[: len(stream)] = stream
    position = np.arange(num_rows)[:, None] * sequence_length + np.arange(sequence_length + 1)
    first = np.arange(num_rows) * sequence_length
    return PackedSequences(
        text=padded[position],
        mask=position[:, 1:] < len(stream),
        documents=np.array([_most_frequent(owner[f : f + sequence_length]) for f in first]),
    )


def pack_last_word(
    number: int, text: str, tokenizer: Tokenizer, sequence_length: int
) -> PackedSequences | None:
    """Returns the row of one passage, or None if no token of its last word can be a label.

    A label needs a token before it, so a passage of one word of one token has none. White space at
    the end of the passage is ignored.
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
    return PackedSequences(text=row[None], mask=mask[None], documents=np.array([number]))


def _common_length(ids: np.ndarray, before: Sequence[int]) -> int:
    """Returns the number of tokens that the passage shares with its beginning encoded alone.

    They differ if a token extends over the border; the last word then starts with that token.
    """
    shared = min(len(ids), len(before))
    different = np.flatnonzero(ids[:shared] != np.array(before[:shared], dtype=np.int32))
    return int(different[0]) if len(different) else shared


def _most_frequent(owner: np.ndarray) -> int:
    numbers, counts = np.unique(owner, return_counts=True)
    return int(numbers[np.argmax(counts)])
