"""What the configuration says of Adam and of the initial values arrives in the learner."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_dwm.config import ParallelConfig
from megatron_dwm.runtime import bring_up
from megatron_dwm.testing import TINY_TRAINING, tiny_learner
from tests.own_environment import kept_environment

LAYERS, STD = 4, 0.05


def test_adams_numbers_and_initial_deviations() -> None:
    """`init_std`, and `init_std / sqrt(2 L)` for the projections into the residual stream."""
    training = replace(TINY_TRAINING, adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-3)
    training = replace(training, weight_decay=0.25)
    with kept_environment(), bring_up(ParallelConfig(), seed=1) as runtime:
        learner = tiny_learner(runtime, training=training, init_std=STD, num_layers=LAYERS)
        groups = learner.optimizer.param_groups
        assert groups and all(tuple(group["betas"]) == (0.7, 0.8) for group in groups)
        assert all(group["eps"] == 1e-3 for group in groups)
        assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
        matrices = 0
        for name, parameter in learner.llm.modules[0].named_parameters():
            if parameter.dim() == 1:
                continue
            into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            expected = STD / math.sqrt(2 * LAYERS) if into_residual else STD
            # The deviation of n draws is within 1 / sqrt(2 n) of the true one; five of these.
            bound = 5 / math.sqrt(2 * parameter.numel())
            assert abs(float(parameter.detach().std()) / expected - 1) < bound, name
            matrices += 1
        assert matrices >= 4 * LAYERS
