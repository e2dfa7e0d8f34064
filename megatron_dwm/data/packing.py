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
from megatron_dwm.data.pieces import (
    ROWS,
    DocumentRules,
    clear_border_labels,
    piece_numbers,
    pieces_of_row,
    unit_numbers,
)

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PackedSequences:
    """R rows of S + 1 tokens, which of the last S count in the loss, and their passages."""

    text: np.ndarray
    """int32 [R, S + 1]"""
    mask: np.ndarray
    """bool [R, S]: true where token 1 to S of the row counts in the loss"""
    owners: np.ndarray
    """int64 [R, S + 1]: number of each token's passage; -1 for padding"""

    def __len__(self) -> int:
        return len(self.text)

    @staticmethod
    def stack(parts: Sequence[PackedSequences]) -> PackedSequences:
        """Returns the rows of all parts, in order."""
        return PackedSequences(
            text=np.concatenate([part.text for part in parts]),
            mask=np.concatenate([part.mask for part in parts]),
            owners=np.concatenate([part.owners for part in parts]),
        )

    def batch(
        self,
        row_ids: Sequence[int],
        domains: Sequence[str],
        num_padding: int = 0,
        rules: DocumentRules = ROWS,
    ) -> Batch:
        """Returns these rows, and `num_padding` rows without loss after them.

        Args:
            row_ids: at least one row.
            domains: the domain of every passage, by its number.
            num_padding: rows to add, so that all batches have the same size; they repeat the last
                one.
            rules: how passages inside a row are told apart.
        """
        ids = np.array([*row_ids, *[row_ids[-1]] * num_padding], dtype=np.int64)
        real = np.arange(len(ids)) < len(row_ids)
        text = torch.from_numpy(self.text[ids].astype(np.int64))
        loss_mask_BS = torch.from_numpy((self.mask[ids] & real[:, None]).astype(np.float32))
        pieces = [pieces_of_row(self.owners[row]) for row in ids]
        if not rules.border_loss:
            clear_border_labels(loss_mask_BS, pieces)
        owners = [document for row in pieces for document in row.unit_documents(rules)]
        repeated = [unit for row in pieces[len(row_ids) :] for unit in row.unit_documents(rules)]
        documents = np.array(owners)
        documents[len(owners) - len(repeated) :] = NO_ROW
        return Batch(
            tokens_BS=text[:, :-1].contiguous(),
            labels_BS=text[:, 1:].contiguous(),
            loss_mask_BS=loss_mask_BS,
            position_ids_BS=torch.arange(text.shape[1] - 1).repeat(len(ids), 1),
            sample_ids_B=torch.from_numpy(np.where(real, ids, NO_ROW)),
            document_ids_U=torch.from_numpy(documents),
            domains=tuple(domains[owner] for owner in owners),
            borders_BS=piece_numbers(pieces) if rules.stop_attention else None,
            units_BS=unit_numbers(pieces) if rules.are_units else None,
            equal_shares=rules.equal_shares,
            tokens_are_units=rules.tokens_are_units,
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
    owned = np.full(len(padded), -1, dtype=np.int64)
    owned[: len(owner)] = owner
    return PackedSequences(
        text=padded[position], mask=position[:, 1:] < len(stream), owners=owned[position]
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
    owners = np.where(np.arange(sequence_length + 1) < len(kept), number, -1)
    return PackedSequences(text=row[None], mask=mask[None], owners=owners[None])


def _common_length(ids: np.ndarray, before: Sequence[int]) -> int:
    """Returns the number of tokens that the passage shares with its beginning encoded alone.

    They differ if a token extends over the border; the last word then starts with that token.
    """
    shared = min(len(ids), len(before))
    different = np.flatnonzero(ids[:shared] != np.array(before[:shared], dtype=np.int32))
    return int(different[0]) if len(different) else shared
