"""Groups and their guards, shared by rule-based methods: those without a weighting model."""

from __future__ import annotations

from torch import Tensor

from megatron_dwm.config import PolicyConfig, WeightingConfig
from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.concentration import weights_from_logits
from megatron_dwm.weighting.groups import Grouping, Groups
from megatron_dwm.weighting.method import BuildContext, Method


class RuleBased(Method):
    """A method whose logits follow from a rule, the same on every rank."""

    @classmethod
    def build(cls, context: BuildContext) -> RuleBased:
        """Build the method in its initial state."""
        config = context.config
        size = config.training.micro_batch_size
        return cls(config.policy, config.weighting, context.llm.runtime, size)

    def __init__(
        self,
        config: PolicyConfig,
        weighting: WeightingConfig,
        runtime: Runtime,
        micro_batch_size: int,
    ) -> None:
        self.config, self.weighting, self.runtime = config, weighting, runtime
        self.grouping = Grouping(runtime, micro_batch_size, weighting.group == "global")

    def group_weights(self, logits_n: Tensor, groups: Groups) -> Tensor:
        """Returns [G, n], the guarded softmax of this replica's logits in its groups."""
        return weights_from_logits(
            groups.gather(logits_n),
            groups.sizes_Gn,
            min_effective_sample_size=self.weighting.min_effective_sample_size,
            uniform_floor=self.weighting.uniform_floor,
        )
