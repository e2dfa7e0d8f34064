"""Encodes many samples with the weighting model's own encoder, one micro-batch at a time.

Each chunk of samples has its own pieces of documents and its own units (encoder.py).

A rank's share of its replica's samples grows with the global batch, and the activations of all of
them do not fit into memory. Samples are encoded independently, so the share is split into chunks of
`training.micro_batch_size` samples. The forward pass of a chunk keeps only its tokens. In the
backward pass each chunk runs forward again and then backward, and phi's gradients add up. The
result is exact: there is no dropout whose random numbers would have to be repeated. Cost: the
activations of one chunk, and a second forward pass if there are several chunks.

Precision: if `model.precision` is not fp32, products are in bf16 (torch's autocast) on every
device, so weights do not depend on the device. Parameters, norms, the residual stream, the pooled
vectors and everything after them are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from megatron_dwm.model.layers.pieces import Pieces
from megatron_dwm.weighting.encoder import Units


@dataclass(frozen=True)
class Division:
    """How some rows are divided, as TokenEncoder.forward takes it."""

    pieces: Pieces | None = None
    units: Units | None = None


def encode(
    encoder: Module,
    tokens_BS: Tensor,
    chunk_rows: int,
    *,
    bf16: bool,
    divide: Callable[[slice], Division] | None = None,
) -> Tensor:
    """Returns the pooled vectors [U, D] in the parameters' precision, with a gradient.

    chunk_rows: samples whose activations are in memory at the same time.
    divide: returns how a range of the rows of `tokens_BS` is divided; None: each row is a unit.
    """
    run = partial(_encode_chunk, encoder, bf16)
    chunks = []
    for first in range(0, len(tokens_BS), chunk_rows):
        rows = slice(first, min(first + chunk_rows, len(tokens_BS)))
        chunks.append((tokens_BS[rows], Division() if divide is None else divide(rows)))
    if len(chunks) == 1:
        return run(*chunks[0])
    return torch.cat(
        [checkpoint(run, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    )


def _encode_chunk(encoder: Module, bf16: bool, tokens_BS: Tensor, division: Division) -> Tensor:
    with torch.autocast(tokens_BS.device.type, torch.bfloat16, enabled=bf16):
        return encoder(tokens_BS, division.pieces, division.units)
