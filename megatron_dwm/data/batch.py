"""A batch: the input of every model, with the origin of each row.

B rows of S tokens. All tensors are on one device; slices share memory with their batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

UNKNOWN_DOMAIN = "unknown"
NO_ROW = -1
"""sample and document id of a padding row"""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of S tokens, the tokens that follow them, and the origin of each row."""

    tokens_BS: torch.Tensor
    """int64, what the model reads"""
    labels_BS: torch.Tensor
    """int64, the token after each of `tokens_BS`"""
    loss_mask_BS: torch.Tensor
    """float32, 1 where the label counts in the loss, else 0"""
    position_ids_BS: torch.Tensor
    """int64, 0 to S - 1 in every row"""
    sample_ids_B: torch.Tensor
    """int64, the row's number in its stream; `NO_ROW` for padding"""
    document_ids_B: torch.Tensor
    """int64, the document with most of the row's tokens; `NO_ROW` for padding"""
    domains: tuple[str, ...]
    """one name a row: the domain of that document"""

    @property
    def size(self) -> int:
        """Rows in the batch (B)."""
        return self.tokens_BS.shape[0]

    def rows(self, start: int, stop: int, step: int = 1) -> Batch:
        """Returns every `step`-th of the rows `start` to `stop - 1`; they share its memory."""
        assert 0 <= start <= stop <= self.size, (start, stop, self.size)
        return replace(
            self,
            **{name: getattr(self, name)[start:stop:step] for name in _tensor_names()},
            domains=self.domains[start:stop:step],
        )

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in _tensor_names()}
        return replace(self, **moved)

    def micro_batches(self, size: int) -> list[Batch]:
        """Returns the rows in order, `size` at a time; `size` must divide the batch."""
        assert size > 0 and self.size % size == 0, (size, self.size)
        return [self.rows(start, start + size) for start in range(0, self.size, size)]

    @staticmethod
    def concatenate(batches: Sequence[Batch]) -> Batch:
        """Returns one batch with the rows of `batches` (at least one), in order."""
        assert batches, "concatenate needs at least one batch"
        joined = {
            name: torch.cat([getattr(batch, name) for batch in batches]) for name in _tensor_names()
        }
        return Batch(**joined, domains=tuple(d for batch in batches for d in batch.domains))


def _tensor_names() -> list[str]:
    return [field.name for field in fields(Batch) if field.name != "domains"]
