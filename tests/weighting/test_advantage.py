"""What a weight should do where not every unit has an alignment."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.advantage import advantages, known_groups
from megatron_dwm.weighting.concentration import weights_from_logits
from megatron_dwm.weighting.groups import Groups
from megatron_dwm.weighting.method import Alignments

LOGITS_1n = torch.tensor([[0.3, -1.0, 2.0, 0.1, 1.4, -0.2, 0.9, -2.0]])
KNOWN_n = torch.tensor([True, True, True, True, False, False, False, False])


@pytest.mark.parametrize("standardized", [True, False])
@pytest.mark.parametrize("floor", [0.0, 0.3, 0.9])
def test_a_unit_without_an_alignment_is_moved_by_nothing(floor: float, standardized: bool) -> None:
    """Autograd of the objective of an update, with respect to the logits."""
    alignments = Alignments(
        values_n=torch.where(KNOWN_n, torch.randn(8, generator=torch.manual_seed(1)), 0.0),
        known_n=KNOWN_n,
        learning_rate=0.1,
    )
    # One micro-batch is the group, for which no process group is asked.
    groups = Groups(runtime=cast(Runtime, None), is_global=False, counts=[8])
    known = known_groups(groups, alignments)
    logits_1n = LOGITS_1n.clone().requires_grad_()
    weights_1n = weights_from_logits(
        logits_1n, None, min_effective_sample_size=0.0, uniform_floor=floor
    )
    advantage_1n = advantages(
        alignments, weights_1n.detach(), known, standardized=standardized, uniform_floor=floor
    )
    assert known.sizes_Gn is not None
    (known.sizes_Gn * advantage_1n * weights_1n).sum().backward()
    gradient_n = logits_1n.grad[0]
    largest = gradient_n[KNOWN_n].abs().max()
    assert largest > 0
    assert gradient_n[~KNOWN_n].abs().max() < 1e-6 * largest
