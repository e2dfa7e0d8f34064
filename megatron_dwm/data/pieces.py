"""The pieces of documents in rows of tokens: borders of the attention, units, and their origins.

A window cuts a document at its ends, and each cut part is a piece of its own. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dwm.config import Config


@dataclass(frozen=True, kw_only=True)
class DocumentRules:
    """How documents inside a row are told apart.

    are_units: a document's piece is a unit; otherwise the whole row is, or each token.
    tokens_are_units: each token is a unit.
    equal_shares: units count the same; otherwise in proportion to their counted tokens.
    stop_attention: attention stops at borders.
    border_loss: the label of the last token of a document, which is the first token of the next
        one, counts in the loss.
    """

    are_units: bool = False
    tokens_are_units: bool = False
    equal_shares: bool = False
    stop_attention: bool = False
    border_loss: bool = True


ROWS = DocumentRules()
"""rows are units, and documents are not told apart"""


def document_rules(config: Config) -> DocumentRules:
    """Returns the rules of a configuration."""
    are_units = config.weighting.unit == "document"
    return DocumentRules(
        are_units=are_units,
        tokens_are_units=config.weighting.unit == "token",
        equal_shares=are_units and config.weighting.unit_share == "equal",
        stop_attention=config.masks_documents,
        border_loss=config.data.border_loss,
    )


@dataclass(frozen=True, kw_only=True)
class RowPieces:
    """The pieces of one row, in order.

    documents: number of each piece's document; -1 for padding at the end.
    lengths: its input tokens, which sum to S.
    ends_at_border: the label of the row's last token belongs to another document.
    """

    documents: np.ndarray
    lengths: np.ndarray
    ends_at_border: bool

    @property
    def main_document(self) -> int:
        """The document with most of the row's tokens; the first of them if several have as many."""
        return int(self.documents[np.argmax(np.where(self.documents >= 0, self.lengths, 0))])

    def unit_documents(self, rules: DocumentRules) -> list[int]:
        """Returns the document of every unit in the row."""
        if not rules.are_units:
            return [self.main_document]
        return self.documents[self.documents >= 0].tolist()

    def unit_values(self, rules: DocumentRules, values_D: np.ndarray) -> np.ndarray:
        """Returns float64, the value of every unit, of a row the mean over its input tokens.

        values_D: one a document of the row's file. The row has no padding.
        """
        own = values_D[self.documents].astype(np.float64)
        return own if rules.are_units else np.average(own, weights=self.lengths)[None]


def pieces_of_row(owners: np.ndarray) -> RowPieces:
    """Returns the pieces of a row from the document of each of its S + 1 tokens."""
    starts = np.flatnonzero(np.diff(owners[:-1], prepend=owners[0] - 1))
    return RowPieces(
        documents=owners[starts],
        lengths=np.diff(starts, append=len(owners) - 1),
        ends_at_border=bool(owners[-1] != owners[-2]),
    )


def piece_numbers(rows: Sequence[RowPieces]) -> Tensor:
    """Returns int64 [B, S]: the number of each token's piece in its row."""
    numbers = [np.repeat(np.arange(len(row.lengths)), row.lengths) for row in rows]
    return torch.from_numpy(np.stack(numbers))


def unit_numbers(rows: Sequence[RowPieces]) -> Tensor:
    """Returns int64 [B, S]: the number of each token's unit in its row; -1 for padding."""
    padding = [np.repeat(row.documents < 0, row.lengths) for row in rows]
    return piece_numbers(rows).masked_fill(torch.from_numpy(np.stack(padding)), -1)


def clear_border_labels(loss_mask_BS: Tensor, rows: Sequence[RowPieces]) -> None:
    """Set the mask to 0, in place, for the last token of every document."""
    for mask_S, row in zip(loss_mask_BS, rows, strict=True):
        last = np.cumsum(row.lengths) - 1
        mask_S[torch.from_numpy(last if row.ends_at_border else last[:-1])] = 0.0
