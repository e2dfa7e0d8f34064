"""Standardizes values whose scale drifts by orders of magnitude (METHOD.md, section 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def standardize(
    values_Gn: Tensor, weights_Gn: Tensor | None = None, sizes_Gn: Tensor | None = None
) -> Tensor:
    """Returns (v - weighted mean of v) / standard deviation of v, per group; 0 if v is constant.

    weights_Gn: weights with mean 1; None for equal weights.
    sizes_Gn: how much each unit counts in means; None: all the same.

    >>> standardize(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    if sizes_Gn is None:
        deviation_G1 = values_Gn.std(-1, keepdim=True, correction=0)
    else:
        # Relative to one of the values, so that constant values have a deviation of exactly 0.
        one_G1 = values_Gn.where(sizes_Gn > 0, -torch.inf).amax(-1, keepdim=True)
        offsets_Gn = torch.where(sizes_Gn > 0, values_Gn - one_G1, 0.0)
        squares_Gn = centered(offsets_Gn, sizes_Gn=sizes_Gn).square()
        deviation_G1 = mean_over_units(squares_Gn, sizes_Gn).sqrt()
    centered_Gn = centered(values_Gn, weights_Gn, sizes_Gn)
    return torch.where(deviation_G1 > 0, centered_Gn / deviation_G1, 0.0)


def centered(
    values_Gn: Tensor, weights_Gn: Tensor | None = None, sizes_Gn: Tensor | None = None
) -> Tensor:
    """Returns v - weighted mean of v, per group; arguments as for `standardize`."""
    weighted_Gn = values_Gn if weights_Gn is None else values_Gn * weights_Gn
    return values_Gn - mean_over_units(weighted_Gn, sizes_Gn)


def mean_over_units(values_Gn: Tensor, sizes_Gn: Tensor | None) -> Tensor:
    """Returns [G, 1]: means over the units of each group; arguments as for `standardize`.

    The mean of a group in which no unit counts is 0.
    """
    if sizes_Gn is None:
        return values_Gn.mean(-1, keepdim=True)
    totals_G1 = sizes_Gn.sum(-1, keepdim=True)
    sums_G1 = (sizes_Gn * values_Gn).sum(-1, keepdim=True)
    return sums_G1 / totals_G1.clamp(min=torch.finfo(totals_G1.dtype).tiny)
