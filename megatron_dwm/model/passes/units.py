"""Which unit every token belongs to. A unit is what gets a weight: a row, or a document in it.

Losses, pooled features and alignments are sums over the tokens of a unit. Where rows are the units
these are reductions over the sequence. Where documents are, they are an index-add, because a row
has any number of documents of any length. Memory: one integer per token, and none for rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_dwm.model.layers.context import ContextPart


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of B rows of S tokens, in the order of the rows.

    count: number of units, U.
    numbers_BS: int64, the unit of each token, from 0; -1 for a token of no unit. None: every row is
        a unit.
    sizes_U: float32, how much each unit counts in the objective, in proportion to the others. None:
        all count the same.
    tokens_U: float32, tokens of each unit in whole rows, if `numbers_BS` is of a part of them;
        None: it is of whole rows.
    """

    count: int
    numbers_BS: Tensor | None = None
    sizes_U: Tensor | None = None
    tokens_U: Tensor | None = None

    def sum_of_rows(self, values_BS: Tensor) -> Tensor:
        """Returns [U]: sums over the tokens of each unit."""
        if self.numbers_BS is None:
            return values_BS.sum(dim=1)
        return self._add(values_BS, self.numbers_BS)

    def at_tokens(self, values_U: Tensor) -> Tensor:
        """Returns the unit's value for every token: [B, 1] or [B, S]; 0 for a token of no unit."""
        if self.numbers_BS is None:
            return values_U[:, None]
        found_BS = values_U[self.numbers_BS.clamp(min=0)]
        return found_BS.where(self.numbers_BS >= 0, 0.0)

    def sum_of_sequence(self, values_SBX: Tensor, dtype: torch.dtype, *, first: int = 0) -> Tensor:
        """Returns [U]: sums over the tokens of each unit and all dimensions after the second.

        first: position in the row of the first value, for a rank with a part of the sequence.
        """
        if self.numbers_BS is None:
            others = [dim for dim in range(values_SBX.dim()) if dim != 1]
            return values_SBX.sum(dim=others, dtype=dtype)
        features = list(range(2, values_SBX.dim()))
        values_SB = values_SBX.sum(dim=features, dtype=dtype) if features else values_SBX.to(dtype)
        return self._add(values_SB, self._part(first, len(values_SB)))

    def of_sequence(self, values_SBX: Tensor, *, first: int = 0) -> Tensor:
        """Returns int64 [S, B]: the unit of each position of `values_SBX`, -1 for none.

        first: as in `sum_of_sequence`.
        """
        if self.numbers_BS is not None:
            return self._part(first, len(values_SBX))
        rows_B = torch.arange(values_SBX.shape[1], device=values_SBX.device)
        return rows_B.expand(values_SBX.shape[:2])

    def pool(self, hidden_SBD: Tensor, *, first: int = 0) -> Tensor:
        """Returns [U, D], float32 or wider: sums over each unit's tokens, divided by their number.

        first: as in `sum_of_sequence`; the parts of all ranks add up to the mean of the unit.
        """
        numbers_BS = self.numbers_BS
        assert numbers_BS is not None, "rows are pooled by the mean over the sequence"
        numbers_SB = self._part(first, len(hidden_SBD))
        at_least_fp32 = torch.promote_types(hidden_SBD.dtype, torch.float32)
        sums_UD = self._add(hidden_SBD.to(at_least_fp32), numbers_SB)
        return sums_UD / self._tokens(numbers_BS)[:, None]

    def of_part(self, part: ContextPart) -> Units:
        """Returns the same units of a part of the rows, with part of the tokens of each."""
        numbers_BS = self.numbers_BS
        if numbers_BS is None:
            return self
        tokens_U, numbers_BS = self._tokens(numbers_BS), part.of_rows(numbers_BS)
        return replace(self, numbers_BS=numbers_BS, tokens_U=tokens_U)

    def flattened(self, like_BS: Tensor) -> Units:
        """Returns the same units of the same tokens as one row of B * S tokens.

        like_BS: any tensor of the tokens, for its shape and device.
        """
        numbers_BS = self.numbers_BS
        if numbers_BS is None:
            rows_B1 = torch.arange(len(like_BS), device=like_BS.device)[:, None]
            numbers_BS = rows_B1.expand(like_BS.shape)
        return Units(count=self.count, numbers_BS=numbers_BS.reshape(1, -1), sizes_U=self.sizes_U)

    def _tokens(self, numbers_BS: Tensor) -> Tensor:
        """Returns [U], the tokens of each unit in whole rows."""
        if self.tokens_U is not None:
            return self.tokens_U
        return self._add(torch.ones_like(numbers_BS, dtype=torch.float32), numbers_BS)

    def _part(self, first: int, length: int) -> Tensor:
        assert self.numbers_BS is not None
        return self.numbers_BS[:, first : first + length].t()

    def _add(self, values: Tensor, numbers: Tensor) -> Tensor:
        """Returns [U, ...]: the sums of `values`, whose first two dimensions are `numbers`'."""
        rows = values.reshape(-1, *values.shape[2:])
        # Row 0 collects the tokens of no unit.
        sums = rows.new_zeros(self.count + 1, *rows.shape[1:])
        places = numbers.reshape(-1) + 1
        if rows.is_cuda:
            # There index_add_ adds in any order, and equal runs differ; this sorts the rows first.
            return sums.index_put_((places,), rows, accumulate=True)[1:]
        return sums.index_add_(0, places, rows)[1:]
