"""What decides the weights: one Protocol; each policy is a file, and a line in `build.py`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_dwm.data.batch import Batch


class Policy(Protocol):
    """A policy sees this data-parallel rank's samples of one optimiser step."""

    def weights(self, batch: Batch) -> Tensor:
        """float32 [n], one a sample, finite, non-negative, mean 1 over the global batch."""
        ...


class UniformPolicy:
    """Every sample weighs 1: plain training."""

    def weights(self, batch: Batch) -> Tensor:
        """Ones, [n]."""
        return torch.ones(batch.size, device=batch.tokens_BS.device)
