"""Weights in proportion to values, with mean 1 in every group.

    w_u = v_u * sum s / sum s v        s: the sizes of the group's units

Equal values give exactly 1: the sums are in double precision. Pure functions: the last dimension is
the weighting group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dwm.weighting.standardize import mean_over_units


def mean_one(values_Gn: Tensor, sizes_Gn: Tensor | None) -> Tensor:
    """Returns float32 weights [G, n], values divided by their mean; 1 each if all values are 0.

    values_Gn: 0 or more. sizes_Gn: how much every unit counts; None: all the same.

    >>> mean_one(torch.tensor([[1.0, 3.0]]), None)
    tensor([[0.5000, 1.5000]])
    >>> mean_one(torch.tensor([[1.0, 3.0]]), torch.tensor([[3.0, 1.0]]))
    tensor([[0.6667, 2.0000]])
    """
    sizes_Gn = None if sizes_Gn is None else sizes_Gn.double()
    means_G1 = mean_over_units(values_Gn.double(), sizes_Gn)
    return torch.where(means_G1 > 0, values_Gn.double() / means_G1, 1.0).float()
