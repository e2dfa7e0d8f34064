"""Standardizes values whose scale drifts by orders of magnitude (METHOD.md, section 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def standardize(values_Gn: Tensor, weights_Gn: Tensor | None = None) -> Tensor:
    """Returns (v - weighted mean of v) / standard deviation of v, per group; 0 if v is constant.

    weights_Gn: weights with mean 1; None for equal weights.
    """
    deviation_G1 = values_Gn.std(-1, keepdim=True, correction=0)
    return torch.where(deviation_G1 > 0, centered(values_Gn, weights_Gn) / deviation_G1, 0.0)


def centered(values_Gn: Tensor, weights_Gn: Tensor | None = None) -> Tensor:
    """Returns v - weighted mean of v, per group; `weights_Gn` is as for `standardize`."""
    weighted_Gn = values_Gn if weights_Gn is None else values_Gn * weights_Gn
    return values_Gn - weighted_Gn.mean(-1, keepdim=True)
