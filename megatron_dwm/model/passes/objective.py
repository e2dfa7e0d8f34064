"""The three losses that a pass can minimize, as coefficients on token losses.

weighted:   (1/n) sum_i w_i l_i with l_i the token-mean loss of sample i   (METHOD.md, section 2)
unit:       sum_i l_i, what the tangent probe differentiates
token mean: the mean over all counted tokens, what validation and evaluation report
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_dwm.model.passes.pipeline import MicroBatch


class TokenBatch(Protocol):
    """Rows of tokens, such as `megatron_dwm.data.Batch`."""

    @property
    def tokens_BS(self) -> Tensor:
        """int64, the input."""
        ...

    @property
    def labels_BS(self) -> Tensor:
        """int64, the token after each input token."""
        ...

    @property
    def loss_mask_BS(self) -> Tensor:
        """float32, 1 for a label whose loss counts, else 0."""
        ...

    @property
    def position_ids_BS(self) -> Tensor:
        """int64, the position of each token in its row."""
        ...

    def rows(self, start: int, stop: int, step: int = 1) -> TokenBatch:
        """Returns every `step`-th of the rows `start` to `stop - 1`."""
        ...


def weighted(batch: TokenBatch, weights_B: Tensor, micro_batch_size: int) -> list[MicroBatch]:
    """Micro-batches of the weighted objective; its denominator is `weighted_denominator`.

    A sample's coefficient is w * S / (counted tokens). If all its tokens count this is exactly w,
    so uniform weights repeat Megatron-LM's own arithmetic.
    """
    counts_B = batch.loss_mask_BS.sum(dim=1).clamp(min=1.0)
    scale_B = weights_B.float() * (batch.tokens_BS.shape[1] / counts_B)
    return _split(batch, batch.loss_mask_BS * scale_B[:, None], micro_batch_size)


def weighted_denominator(batch: TokenBatch) -> float:
    """Returns n * S of the local samples, a constant: scaling all weights scales the gradient."""
    return float(batch.tokens_BS.numel())


def unit(batch: TokenBatch, micro_batch_size: int) -> list[MicroBatch]:
    """Micro-batches of the sum of the samples' token-mean losses."""
    counts_B = batch.loss_mask_BS.sum(dim=1).clamp(min=1.0)
    return _split(batch, batch.loss_mask_BS / counts_B[:, None], micro_batch_size)


def token_mean(batch: TokenBatch, micro_batch_size: int) -> list[MicroBatch]:
    """Micro-batches of the mean over counted tokens; its denominator is `token_count`."""
    return _split(batch, batch.loss_mask_BS, micro_batch_size)


def token_count(batch: TokenBatch) -> float:
    """Number of tokens in the local samples whose loss counts."""
    return float(batch.loss_mask_BS.sum())


def _split(batch: TokenBatch, coefficients_BS: Tensor, size: int) -> list[MicroBatch]:
    assert batch.tokens_BS.shape[0] % size == 0, "micro-batches divide a batch"
    columns = (
        batch.tokens_BS,
        batch.labels_BS,
        batch.position_ids_BS,
        coefficients_BS,
        batch.loss_mask_BS,
    )
    return [
        MicroBatch(*rows) for rows in zip(*(torch.split(c, size) for c in columns), strict=True)
    ]
