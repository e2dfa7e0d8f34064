"""The validation loss as an object: the loss that the weights are to lower.

An objective sets the coefficient of every token's loss. Its gradient is then one pass through the
pipeline, and its value is the quotient of two sums over samples and replicas.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_dwm.model import MicroBatch, PassResult
from megatron_dwm.model.passes.objective import TokenBatch, token_count, token_mean


class ValidationObjective(Protocol):
    """A loss that is a sum over samples divided by a sum over samples."""

    def micro_batches(self, batch: TokenBatch, micro_batch_size: int) -> list[MicroBatch]:
        """Returns the rows as micro-batches with the coefficients of their token losses."""
        ...

    def denominator(self, batch: TokenBatch) -> float:
        """Returns this replica's part of the divisor."""
        ...

    def sums(self, result: PassResult) -> Tensor:
        """Returns this replica's part of the dividend and of the divisor, float64 [2]."""
        ...


class TokenMean:
    """The mean over all counted tokens (`validation.loss_on` chooses which tokens count)."""

    def micro_batches(self, batch: TokenBatch, micro_batch_size: int) -> list[MicroBatch]:
        """Returns micro-batches in which every counted token has coefficient 1."""
        return token_mean(batch, micro_batch_size)

    def denominator(self, batch: TokenBatch) -> float:
        """Returns the number of counted tokens."""
        return token_count(batch)

    def sums(self, result: PassResult) -> Tensor:
        """Returns the sum of the token losses and the number of tokens, float64 [2]."""
        return torch.stack(
            [result.loss_sums_n.double().sum(), result.token_counts_n.double().sum()]
        )


TOKEN_MEAN = TokenMean()
