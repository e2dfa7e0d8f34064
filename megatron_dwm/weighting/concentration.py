"""From logits to weights of mean 1, with the guards against concentration (METHOD.md, section 6).

    w = n * softmax(logits / T),  T >= 1 the smallest temperature that keeps the effective sample
    size (sum w)^2 / (n * sum w^2), a fraction of the group, at its bound or above;
    then w <- (1 - floor) * w + floor.

Units may have different sizes s: then the mean of w that is 1 is sum s w / sum s, and each unit
counts s times in the effective sample size.

Pure functions on groups: the last dimension is the weighting group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUARDS = "raise weighting.min_effective_sample_size or weighting.uniform_floor"
"""what to change if a few samples get nearly all the weight"""

# log T is found to within log(1e6) / 64^5 = 1e-8, in double precision log(1e6) / 64^7 = 3e-12;
# where logits are more than 1e3 apart, log(1e3 * gap) takes the place of log(1e6).
_POINTS, _ROUNDS, _ROUNDS_DOUBLE = 64, 5, 7
_LARGEST_TEMPERATURE, _LARGEST_PER_GAP = 1e6, 1e3


def effective_sample_size(weights_Gn: Tensor, sizes_Gn: Tensor | None = None) -> Tensor:
    """Returns [G]: (sum s w)^2 / (sum s * sum s w^2), at most 1; sizes s of None are all 1.

    >>> effective_sample_size(torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0]]))
    tensor([1.0000, 0.5000])
    """
    if sizes_Gn is None:
        n = weights_Gn.shape[-1]
        return weights_Gn.sum(-1).square() / (n * weights_Gn.square().sum(-1))
    sized_Gn = sizes_Gn * weights_Gn
    return sized_Gn.sum(-1).square() / (sizes_Gn.sum(-1) * (sized_Gn * weights_Gn).sum(-1))


def normalized_entropy(weights_Gn: Tensor, sizes_Gn: Tensor | None = None) -> Tensor:
    """Returns [G]: entropy of w / sum w over log n; 1 for uniform weights, also if n is 1.

    With sizes s it is 1 - KL(p | q) / log(1 / min q) for p = s w / sum s w and q = s / sum s, which
    is the same if all sizes are equal.
    """
    n = weights_Gn.shape[-1]
    if n == 1:
        return torch.ones_like(weights_Gn[..., 0])
    if sizes_Gn is None:
        shares = weights_Gn / weights_Gn.sum(-1, keepdim=True)
        return -torch.special.xlogy(shares, shares).sum(-1) / math.log(n)
    q_Gn = sizes_Gn / sizes_Gn.sum(-1, keepdim=True)
    p_Gn = q_Gn * weights_Gn / (q_Gn * weights_Gn).sum(-1, keepdim=True)
    divergence_G = torch.special.xlogy(p_Gn, p_Gn / q_Gn).where(p_Gn > 0, 0.0).sum(-1)
    largest_G = -q_Gn.where(q_Gn > 0, 1.0).amin(-1).log()
    return torch.where(largest_G > 0, 1.0 - divergence_G / largest_G, 1.0)


def weights_from_logits(
    logits_Gn: Tensor,
    sizes_Gn: Tensor | None = None,
    *,
    min_effective_sample_size: float,
    uniform_floor: float,
    temperature_G: Tensor | None = None,
) -> Tensor:
    """Turn logits [G, n] into weights [G, n], non-negative and with mean 1 in every group.

    sizes_Gn: how much each unit counts in the mean, and in the effective sample size; None: all the
    same. A unit of size 0 counts nowhere. If no unit of a group counts, all its weights are 1.
    temperature_G: T, in place of the smallest that keeps the bound.

    Equal logits give exactly 1. The gradient is taken at a fixed temperature. Where the bound on
    the effective sample size is active, this is not the full derivative: the weights there do not
    depend on the scale of the logits, so with the full derivative a group with one sample far above
    the others would never recover.

    >>> logits_Gn = torch.tensor([[0.0, 0.0, 0.0, 9.0]])
    >>> weights_from_logits(logits_Gn, min_effective_sample_size=0.0, uniform_floor=0.0)
    tensor([[4.9346e-04, 4.9346e-04, 4.9346e-04, 3.9985e+00]])
    >>> weights_from_logits(logits_Gn, min_effective_sample_size=0.5, uniform_floor=0.0)
    tensor([[0.4226, 0.4226, 0.4226, 2.7321]])
    """
    if sizes_Gn is not None:
        counts_G1 = (sizes_Gn > 0).any(-1, keepdim=True)
        logits_Gn, sizes_Gn = logits_Gn.where(counts_G1, 0.0), sizes_Gn.where(counts_G1, 1.0)
    if temperature_G is None and min_effective_sample_size > 0.0:
        temperature_G = temperature(logits_Gn, min_effective_sample_size, sizes_Gn)
    if temperature_G is not None:
        logits_Gn = logits_Gn / temperature_G[..., None]
    weights_Gn = _softmax_of_mean_one(logits_Gn, sizes_Gn)
    return weights_Gn * (1.0 - uniform_floor) + uniform_floor if uniform_floor else weights_Gn


@torch.no_grad()
def temperature(logits_Gn: Tensor, bound: float, sizes_Gn: Tensor | None = None) -> Tensor:
    """Returns [G]: the smallest temperature of each group that keeps the bound, at least 1.

    Found on a grid in log T that is refined between its last point below the bound and the next;
    the size grows with T. Carries no gradient.
    """
    low_G = torch.zeros_like(logits_Gn[..., 0])  # log T
    width_G = _log_of_largest(logits_Gn, sizes_Gn)
    points_P = torch.arange(_POINTS, device=low_G.device, dtype=low_G.dtype)
    for _ in range(_ROUNDS_DOUBLE if low_G.dtype == torch.float64 else _ROUNDS):
        width_G = width_G / _POINTS
        log_PG = low_G + width_G * points_P.view(-1, *[1] * low_G.dim())
        short_PG = _size_at(logits_Gn, log_PG.exp(), sizes_Gn) < bound
        low_G = low_G + width_G * (short_PG.sum(0) - 1).clamp(min=0)
    holds_G = _size_at(logits_Gn, torch.ones_like(low_G), sizes_Gn) >= bound
    return torch.where(holds_G, 1.0, (low_G + width_G).exp())


def _log_of_largest(logits_Gn: Tensor, sizes_Gn: Tensor | None) -> Tensor:
    """Returns [G]: log of a temperature at which the weights are uniform but for 0.1 %."""
    counts_Gn = torch.ones_like(logits_Gn).bool() if sizes_Gn is None else sizes_Gn > 0
    highest_G = logits_Gn.where(counts_Gn, -torch.inf).amax(-1)
    gap_G = highest_G - logits_Gn.where(counts_Gn, torch.inf).amin(-1)
    gap_G = gap_G.where(gap_G.isfinite(), 0.0)
    # The logarithms are added, since a product may overflow.
    per_gap_G = gap_G.clamp(min=1.0).log() + math.log(_LARGEST_PER_GAP)
    return per_gap_G.clamp(min=math.log(_LARGEST_TEMPERATURE))


def _size_at(logits_Gn: Tensor, temperature_G: Tensor, sizes_Gn: Tensor | None) -> Tensor:
    weights_Gn = _softmax_of_mean_one(logits_Gn / temperature_G[..., None], sizes_Gn)
    return effective_sample_size(weights_Gn, sizes_Gn)


def _softmax_of_mean_one(logits_Gn: Tensor, sizes_Gn: Tensor | None) -> Tensor:
    """Returns the softmax with mean 1, computed so that equal logits give exactly 1 for every n."""
    if sizes_Gn is None:
        shifted_Gn = (logits_Gn - logits_Gn.amax(-1, keepdim=True).detach()).exp()
        return shifted_Gn * (logits_Gn.shape[-1] / shifted_Gn.sum(-1, keepdim=True))
    largest_G1 = logits_Gn.where(sizes_Gn > 0, -torch.inf).amax(-1, keepdim=True).detach()
    # Without the bound a unit of size 0 could overflow, and 0 times infinity is not 0.
    shifted_Gn = (logits_Gn - largest_G1).clamp(max=0.0).exp()
    sums_G1 = (sizes_Gn * shifted_Gn).sum(-1, keepdim=True)
    return shifted_Gn * (sizes_Gn.sum(-1, keepdim=True) / sums_G1)
