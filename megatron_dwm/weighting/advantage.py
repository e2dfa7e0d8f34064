"""What a unit's weight should do, from the alignments: rise where it is above the group's mean.

    a_i = (s_i - weighted mean of s) / deviation of s       standardized
    a_i = eta * s_i - weighted mean of eta * s              in nats of validation loss

Means are over the units whose alignment is known. Their weights, scaled to mean 1 among them, are
the softmax over these units alone, so a gradient of sum_i a_i w_i over them is that of their own
weighted mean: a unit without an alignment pulls nothing up or down. A uniform floor is no part of
the softmax, so it is taken off before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dwm.weighting.groups import Groups
from megatron_dwm.weighting.method import Alignments
from megatron_dwm.weighting.standardize import centered, mean_over_units, standardize


def known_groups(groups: Groups, alignments: Alignments) -> Groups:
    """Returns the groups in which only the units with an alignment count."""
    return groups if alignments.known_n is None else groups.only(alignments.known_n)


def advantages(
    alignments: Alignments,
    weights_Gn: Tensor,
    known: Groups,
    *,
    standardized: bool,
    uniform_floor: float = 0.0,
) -> Tensor:
    """Returns a_i of the known units, [G, n]; `known` is from `known_groups`.

    uniform_floor: the least weight, which was added to the softmax.
    """
    alignment_Gn = known.gather(alignments.values_n)
    if alignments.known_n is not None:
        weights_Gn = (weights_Gn - uniform_floor).clamp(min=0.0)
        mean_G1 = mean_over_units(weights_Gn, known.sizes_Gn)
        weights_Gn = torch.where(mean_G1 > 0, weights_Gn / mean_G1, 1.0)
    if standardized:
        return standardize(alignment_Gn, weights_Gn, known.sizes_Gn)
    return centered(alignment_Gn * alignments.learning_rate, weights_Gn, known.sizes_Gn)
