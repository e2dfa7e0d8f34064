"""From logits to weights of mean 1, with the guards against concentration (METHOD.md, section 6).

    w = n * softmax(logits / T),  T >= 1 the smallest temperature that keeps the effective sample
    size (sum w)^2 / (n * sum w^2), a fraction of the group, at its bound or above;
    then w <- (1 - floor) * w + floor.

Pure functions on groups: the last dimension is the weighting group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUARDS = "raise weighting.min_effective_sample_size or weighting.uniform_floor"
"""what to change if a few samples get nearly all the weight"""

_BISECTIONS = 40
# Divided by this, any gap between logits that a head produces has an exp of 1 in float32.
_LARGEST_TEMPERATURE = 1e6


def effective_sample_size(weights_Gn: Tensor) -> Tensor:
    """Returns [G]: (sum w)^2 / (n * sum w^2), between 1/n and 1."""
    n = weights_Gn.shape[-1]
    return weights_Gn.sum(-1).square() / (n * weights_Gn.square().sum(-1))


def normalized_entropy(weights_Gn: Tensor) -> Tensor:
    """Returns [G]: entropy of w / sum w over log n; 1 for uniform weights, also if n is 1."""
    n = weights_Gn.shape[-1]
    if n == 1:
        return torch.ones_like(weights_Gn[..., 0])
    shares = weights_Gn / weights_Gn.sum(-1, keepdim=True)
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(n)


def weights_from_logits(
    logits_Gn: Tensor, *, min_effective_sample_size: float, uniform_floor: float
) -> Tensor:
    """Turn logits [G, n] into weights [G, n], non-negative and with mean 1 in every group.

    Equal logits give exactly 1. The gradient is taken at a fixed temperature. Where the bound on
    the effective sample size is active, this is not the full derivative: the weights there do not
    depend on the scale of the logits, so with the full derivative a group with one sample far above
    the others would never recover.
    """
    if min_effective_sample_size > 0.0:
        logits_Gn = logits_Gn / temperature(logits_Gn, min_effective_sample_size)[..., None]
    weights_Gn = _softmax_times_n(logits_Gn)
    return weights_Gn * (1.0 - uniform_floor) + uniform_floor if uniform_floor else weights_Gn


@torch.no_grad()
def temperature(logits_Gn: Tensor, bound: float) -> Tensor:
    """Returns [G]: the smallest temperature of each group that keeps the bound, at least 1.

    Found by bisection in log T; carries no gradient.
    """
    low_G = torch.zeros_like(logits_Gn[..., 0])  # log T
    high_G = torch.full_like(low_G, math.log(_LARGEST_TEMPERATURE))
    for _ in range(_BISECTIONS):
        middle_G = (low_G + high_G) / 2
        enough_G = _size_at(logits_Gn, middle_G.exp()) >= bound
        high_G = torch.where(enough_G, middle_G, high_G)
        low_G = torch.where(enough_G, low_G, middle_G)
    holds_G = _size_at(logits_Gn, torch.ones_like(low_G)) >= bound
    return torch.where(holds_G, 1.0, high_G.exp())


def _size_at(logits_Gn: Tensor, temperature_G: Tensor) -> Tensor:
    return effective_sample_size(_softmax_times_n(logits_Gn / temperature_G[..., None]))


def _softmax_times_n(logits_Gn: Tensor) -> Tensor:
    """Returns n * softmax, computed so that equal logits give exactly 1 for every n."""
    shifted_Gn = (logits_Gn - logits_Gn.amax(-1, keepdim=True).detach()).exp()
    return shifted_Gn * (logits_Gn.shape[-1] / shifted_Gn.sum(-1, keepdim=True))
