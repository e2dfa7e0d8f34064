"""A choice of units one by one, each with regard to those already chosen.

    value of i = s_i - redundancy * sum over the chosen j of K_ij,   K_ij = eta <J g_i, J g_j>

s_i is the alignment and g_i the gradient of unit i. eta times this is GREATS' value (Wang et al.,
NeurIPS 2024): eta <g_i, g_val> - eta^2 <g_i, g_j>, the second-order term of the loss after the step
with the identity for the Hessian. GREATS steps by plain descent, J = 1; with Adam's Jacobian it is
that of the step which is taken, as in OPUS. Pure functions: the last dimension of scores is the
weighting group. Cost: n^2 K for the overlaps of n units, n a choice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def overlaps(overlap_GnK: Tensor) -> Tensor:
    """Returns [G, n, n], the inner products of a group's rows."""
    return overlap_GnK @ overlap_GnK.transpose(-1, -2)


def in_deviations(overlaps_Gnn: Tensor, scores_Gn: Tensor, counts_Gn: Tensor) -> Tensor:
    """Returns the overlaps times one number a group: then their mean K_ii is the scores' deviation.

    So repeating a chosen unit of average size costs one standard deviation of the scores, whatever
    the size of the model, the learning rate and the batch. counts_Gn: as in `choose_greedily`.
    """
    counts_Gn = counts_Gn.to(scores_Gn.dtype)
    total_G1 = counts_Gn.sum(-1, keepdim=True).clamp(min=1.0)
    mean_G1 = (scores_Gn * counts_Gn).sum(-1, keepdim=True) / total_G1
    squares_Gn = (scores_Gn - mean_G1).square() * counts_Gn
    deviation_G1 = (squares_Gn.sum(-1, keepdim=True) / total_G1).sqrt()
    own_Gn = overlaps_Gnn.diagonal(dim1=-2, dim2=-1) * counts_Gn
    own_G1 = own_Gn.sum(-1, keepdim=True) / total_G1
    factor_G1 = torch.where(own_G1 > 0, deviation_G1 / own_G1, 0.0)
    return overlaps_Gnn * factor_G1[..., None]


def choose_greedily(
    scores_Gn: Tensor, overlaps_Gnn: Tensor, counts_Gn: Tensor, kept_G1: Tensor, redundancy: float
) -> Tensor:
    """Returns bool [G, n]: in every choice the unit of the largest value, the first of equal ones.

    counts_Gn: False for a unit that cannot be chosen. kept_G1: how many to choose.

    >>> scores_Gn = torch.tensor([[3.0, 2.9, 1.0]])  # the second unit repeats the first
    >>> overlaps_Gnn = overlaps(torch.tensor([[[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]))
    >>> can = torch.tensor([[True, True, True]])
    >>> choose_greedily(scores_Gn, overlaps_Gnn, can, torch.tensor([[2]]), redundancy=0.0)
    tensor([[ True,  True, False]])
    >>> choose_greedily(scores_Gn, overlaps_Gnn, can, torch.tensor([[2]]), redundancy=1.0)
    tensor([[ True, False,  True]])
    """
    values_Gn = scores_Gn.where(counts_Gn, -torch.inf)
    chosen_Gn = torch.zeros_like(counts_Gn)
    numbers_n = torch.arange(values_Gn.shape[-1], device=values_Gn.device)
    for number in range(int(kept_G1.max())):
        best_G1 = values_Gn.amax(-1, keepdim=True)
        first_G1 = numbers_n.where(values_Gn == best_G1, len(numbers_n)).amin(-1, keepdim=True)
        now_Gn = (numbers_n == first_G1) & (number < kept_G1) & counts_Gn
        chosen_Gn = chosen_Gn | now_Gn
        overlap_Gn = (overlaps_Gnn * now_Gn[..., None]).sum(dim=-2)
        values_Gn = (values_Gn - redundancy * overlap_Gn).where(~now_Gn, -torch.inf)
    return chosen_Gn
