"""Uniform weights: plain training, bit-identical to Megatron-Core's own loop."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dwm.data import Batch
from megatron_dwm.model import ForwardOutputs
from megatron_dwm.weighting.method import Counters, Method


class Uniform(Method):
    """Every sample weighs 1."""

    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns ones, [n]."""
        return torch.ones(batch.units.count, device=batch.tokens_BS.device)
