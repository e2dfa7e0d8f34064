"""The three losses that a pass can minimize, as coefficients on token losses.

weighted:   sum_u s_u w_u l_u / sum_u s_u with l_u the token-mean loss of unit u and s_u its size
            (METHOD.md, sections 2 and 7)
unit:       sum_u l_u, what the tangent probe differentiates
token mean: the mean over all counted tokens, what validation and evaluation report
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_dwm.model.passes.micro_batch import MicroBatch
from megatron_dwm.model.passes.units import Units


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

    @property
    def borders_BS(self) -> Tensor | None:
        """int64, the document piece of each token in its row; None: attention has no borders."""
        ...

    @property
    def units(self) -> Units:
        """What gets a weight."""
        ...

    def rows(self, start: int, stop: int, step: int = 1) -> TokenBatch:
        """Returns every `step`-th of the rows `start` to `stop - 1`."""
        ...


def weighted(batch: TokenBatch, weights_U: Tensor, micro_batch_size: int) -> list[MicroBatch]:
    """Micro-batches of the weighted objective; its denominator is `weighted_denominator`.

    A token's coefficient is w * s / (counted tokens of its unit). The size s of a row is S. So this
    is exactly w if all tokens count, or if a document's size is its number of counted tokens, and
    uniform weights repeat Megatron-LM's own arithmetic.
    """
    units = batch.units
    counts_U = units.sum_of_rows(batch.loss_mask_BS).clamp(min=1.0)
    sizes_U = batch.tokens_BS.shape[1] if units.sizes_U is None else units.sizes_U
    scale_U = weights_U.float() * (sizes_U / counts_U)
    return _split(batch, batch.loss_mask_BS * units.at_tokens(scale_U), micro_batch_size)


def weighted_denominator(batch: TokenBatch) -> float | Tensor:
    """Returns the sum of the local units' sizes, to which weights do not contribute.

    So scaling all weights scales the gradient. If it is a sum, it stays on the device.
    """
    sizes_U = batch.units.sizes_U
    return float(batch.tokens_BS.numel()) if sizes_U is None else sizes_U.sum()


def unit(batch: TokenBatch, micro_batch_size: int) -> list[MicroBatch]:
    """Micro-batches of the sum of the units' token-mean losses."""
    units = batch.units
    counts_U = units.sum_of_rows(batch.loss_mask_BS).clamp(min=1.0)
    if units.numbers_BS is None:
        coefficients_BS = batch.loss_mask_BS / counts_U[:, None]
    else:
        coefficients_BS = batch.loss_mask_BS * units.at_tokens(1.0 / counts_U)
    return _split(batch, coefficients_BS, micro_batch_size)


def token_mean(batch: TokenBatch, micro_batch_size: int) -> list[MicroBatch]:
    """Micro-batches of the mean over counted tokens; its denominator is `token_count`."""
    return _split(batch, batch.loss_mask_BS, micro_batch_size)


def token_count(batch: TokenBatch) -> float:
    """Number of tokens in the local samples whose loss counts."""
    return float(batch.loss_mask_BS.sum())


def _split(batch: TokenBatch, coefficients_BS: Tensor, size: int) -> list[MicroBatch]:
    rows = batch.tokens_BS.shape[0]
    assert rows % size == 0, "micro-batches divide a batch"
    parts = [batch.rows(start, start + size) for start in range(0, rows, size)]
    return [
        MicroBatch(
            tokens_BS=part.tokens_BS,
            labels_BS=part.labels_BS,
            position_ids_BS=part.position_ids_BS,
            coefficients_BS=coefficients,
            loss_mask_BS=part.loss_mask_BS,
            units=part.units,
            borders_BS=part.borders_BS,
        )
        for part, coefficients in zip(parts, torch.split(coefficients_BS, size), strict=True)
    ]
