"""Weights straight from the alignments of the batch at hand, which DWM's model only predicts.

    s_i = <z, grad l_i(theta)>  at uniform weights on this batch (METHOD.md, section 2)
    w   = the guarded softmax of (s - mean s) / (deviation of s) / temperature over the group

Nothing is learned and there is no state: a step computes g at uniform weights, the virtual step,
the validation gradient and the alignments, and then the weighted gradient of the same batch. The
alignments are exact for this batch and hold for no other one, so the steps between
(`policy.alignment_interval`) have uniform weights. So have the first `policy.alignment_warmup`
steps, since Adam's J is near zero while its moments are empty.

Cost: three more plain steps in every step with alignments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.model import ForwardOutputs, LlamaShape
from megatron_dwm.weighting.concentration import GUARDS
from megatron_dwm.weighting.costs import Costs, Workload, learning_costs
from megatron_dwm.weighting.method import Counters
from megatron_dwm.weighting.rule_based import RuleBased
from megatron_dwm.weighting.rules import estimator_problems, group_problems, target_problems
from megatron_dwm.weighting.schedule import Schedule
from megatron_dwm.weighting.standardize import standardize


class GradientAlignment(RuleBased):
    """Weights from the hypergradient at uniform weights."""

    gentler = f"{GUARDS}, or policy.alignment_temperature"
    aligns_first: ClassVar[bool] = True

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a target, hypergradients and groups."""
        reads = {"target", "passages", "hypergradients"}
        return frozenset({*reads, "gradient_alignment", "groups", "softmax"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check the rules of the target, of groups and of the estimator."""
        yield from target_problems(config)
        yield from group_problems(config)
        yield from estimator_problems(config, world_size)

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """Returns an update inside the first step after the warm-up, and then every interval."""
        policy, steps = config.policy, config.training.steps
        inside = range(policy.alignment_warmup + 1, steps + 1, policy.alignment_interval)
        return Schedule(steps=steps, update_steps=inside, in_step=True)

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns the costs of updates with a pass for g at uniform weights."""
        return learning_costs(config, llm, workload, gradient_pass=True)

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], mean 1 in every weighting group; all 1 without alignments."""
        if outputs is None or outputs.alignment_n is None:
            return torch.ones(batch.units.count, device=batch.tokens_BS.device)
        groups = self.grouping.of(batch)
        alignment_n = outputs.alignment_n
        standard_Gn = standardize(groups.gather(alignment_n), sizes_Gn=groups.sizes_Gn)
        logits_n = groups.local(standard_Gn) / self.config.alignment_temperature
        return groups.local(self.group_weights(logits_n, groups))
