"""Encodes many samples with the weighting model's own encoder, one micro-batch at a time.

A rank's share of its replica's samples grows with the global batch, and the activations of all of
them do not fit into memory. Rows are encoded independently, so the share is split into chunks of
`training.micro_batch_size` samples. The forward pass of a chunk keeps only its tokens. In the
backward pass each chunk runs forward again and then backward, and phi's gradients add up. The
result is exact: there is no dropout whose random numbers would have to be repeated. Cost: the
activations of one chunk, and a second forward pass if there are several chunks.

Precision: if `model.precision` is not fp32, products are in bf16 (torch's autocast) on every
device, so weights do not depend on the device. Parameters, norms, the residual stream, the pooled
vectors and everything after them are fp32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from megatron_dwm.data import Batch
from megatron_dwm.model.layers.pieces import pieces_of


def encode(encoder: Module, batch: Batch, chunk_rows: int, *, bf16: bool) -> Tensor:
    """Returns the pooled vectors [U, D] in the parameters' precision, with a gradient.

    chunk_rows: samples whose activations are in memory at the same time.
    """
    run = partial(_encode_chunk, encoder, bf16)
    starts = range(0, batch.size, chunk_rows)
    if len(starts) == 1:
        return run(batch)
    chunks = [batch.rows(start, min(start + chunk_rows, batch.size)) for start in starts]
    return torch.cat(
        [checkpoint(run, rows, use_reentrant=False, preserve_rng_state=False) for rows in chunks]
    )


def _encode_chunk(encoder: Module, bf16: bool, batch: Batch) -> Tensor:
    pieces = None if batch.borders_BS is None else pieces_of(batch.borders_BS)
    with torch.autocast(batch.tokens_BS.device.type, torch.bfloat16, enabled=bf16):
        return encoder(batch.tokens_BS, pieces, batch.units)
