"""Many samples through the weighting model's own encoder, a micro-batch of them at a time.

A rank's share of its replica's samples grows with the cluster's batch, and the activations of all
of them at once do not fit. A sample is encoded without the others, so the share is cut into chunks
of `training.micro_batch_size` samples. A chunk's forward pass keeps its tokens only. Once the
gradient of the pooled vectors has come back through groups and weights, chunk after chunk runs
forward again and backward, and phi's gradient adds up. Nothing of it is approximate; there is no
dropout whose random numbers would have to be repeated. Cost: the activations of one chunk, and one
forward pass more where there are several.

Precision: where `model.precision` is not fp32, products are in bf16 (torch's autocast) on every
device, so a run weighs alike wherever it is; parameters, norms, the residual stream and the pooled
vectors are fp32, and so is all that follows.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint


def encode(encoder: Module, tokens_BS: Tensor, chunk_rows: int, *, bf16: bool) -> Tensor:
    """Pooled vectors [B, D] in the parameters' precision, differentiable in the parameters.

    chunk_rows: samples whose activations are held at once.
    """
    run = partial(_encode_chunk, encoder, bf16)
    chunks = tokens_BS.split(chunk_rows)
    if len(chunks) == 1:
        return run(tokens_BS)
    return torch.cat(
        [checkpoint(run, rows, use_reentrant=False, preserve_rng_state=False) for rows in chunks]
    )


def _encode_chunk(encoder: Module, bf16: bool, tokens_BS: Tensor) -> Tensor:
    with torch.autocast(tokens_BS.device.type, torch.bfloat16, enabled=bf16):
        return encoder(tokens_BS)
