"""Weights that keep the units with the largest scores of a group, and drop the others.

    w_u = sum s / (sum of s over kept units) for the k largest scores, else 0;  k = max(1, r n)

with n the number of units that count and s their sizes, so the mean of w is 1. With r = 1 all
weights are exactly 1. Pure functions: the last dimension is the weighting group. Cost: a sort.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_largest(scores_Gn: Tensor, sizes_Gn: Tensor | None, ratio: float) -> Tensor:
    """Returns weights [G, n], 0 or above, with mean 1 in every group.

    sizes_Gn: how much every unit counts; 0 for one that cannot be kept. None: all the same.
    ratio: fraction of a group's units to keep, rounded; equal scores are kept in their order.

    >>> keep_largest(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), None, ratio=0.5)
    tensor([[0., 2., 0., 2.]])
    """
    sizes_Gn = torch.ones_like(scores_Gn) if sizes_Gn is None else sizes_Gn
    counts_Gn = sizes_Gn > 0
    kept_G1 = number_kept(counts_Gn, ratio)
    # torch sorts NaN first, and nothing is known of such a unit.
    ranked_Gn = scores_Gn.where(counts_Gn & ~scores_Gn.isnan(), -torch.inf)
    order_Gn = ranked_Gn.argsort(dim=-1, descending=True, stable=True)
    numbers_n = torch.arange(order_Gn.shape[-1], device=order_Gn.device)
    places_Gn = order_Gn.scatter(-1, order_Gn, numbers_n.expand_as(order_Gn))
    return weights_of_kept((places_Gn < kept_G1) & counts_Gn, sizes_Gn)


def number_kept(counts_Gn: Tensor, ratio: float) -> Tensor:
    """Returns float [G, 1]: how many to keep of the units of a group that count, at least 1."""
    return (ratio * counts_Gn.sum(-1, keepdim=True)).round().clamp(min=1.0)


def weights_of_kept(chosen_Gn: Tensor, sizes_Gn: Tensor) -> Tensor:
    """Returns weights [G, n] with mean 1 in every group, the same for all chosen units, else 0."""
    kept_size_G1 = (sizes_Gn * chosen_Gn).sum(-1, keepdim=True)
    return chosen_Gn * (sizes_Gn.sum(-1, keepdim=True) / kept_size_G1.where(kept_size_G1 > 0, 1.0))
