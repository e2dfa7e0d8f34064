"""A baseline without a model: a running mean of alignments for every domain label (METHOD.md,
section 6). What a weighting model that reads the samples has to beat.

    m_d <- decay * m_d + (1 - decay) * mean over the batch's samples of domain d of a_i
    w   =  the guarded softmax of m_domain(i) / temperature over the weighting group

with a_i the alignments s_i, standardized in the weighting group, or (`weighting.standardize false`)
eta * s_i less the group's weighted mean, in nats of validation loss, for which the temperature has
to be made some hundred times smaller. A domain that has not been outputs has m_d = 0, the mean.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.config import Config, PolicyConfig, WeightingConfig
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.model import ForwardOutputs, LlamaShape
from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.concentration import weights_from_logits
from megatron_dwm.weighting.costs import Costs, learning_costs
from megatron_dwm.weighting.groups import Grouping, gather_over_data
from megatron_dwm.weighting.method import (
    Alignments,
    BuildContext,
    Counters,
    Method,
    WeightingUpdate,
)
from megatron_dwm.weighting.noise import Reliability
from megatron_dwm.weighting.rules import group_problems, learning_problems, target_problems
from megatron_dwm.weighting.schedule import Schedule, schedule_of
from megatron_dwm.weighting.standardize import centered, standardize


class DomainMean(Method):
    """A number for every domain, the same on every rank."""

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """A target, updates from alignments, groups and the means."""
        return frozenset({"target", "updates", "alignments", "domain_mean", "groups"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Rules of the target, of groups and of learning."""
        yield from target_problems(config)
        yield from group_problems(config)
        yield from learning_problems(config, world_size)

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """As `weighting.mode` says."""
        return schedule_of(config)

    @classmethod
    def costs(
        cls, config: Config, llm: LlamaShape, *, replicas: int, passages: int | None = None
    ) -> Costs:
        """Learning costs without a weighting model."""
        return learning_costs(config, llm, passages=passages)

    @classmethod
    def build(cls, context: BuildContext) -> DomainMean:
        """With no domain outputs."""
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
        self.reliability = Reliability()
        self.means: dict[str, float] = {}

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """float32 [n], mean 1 in every weighting group; exactly 1 before the first update."""
        return self.grouping.local(self._group_weights(batch))

    @torch.no_grad()
    def update(
        self, batch: Batch, outputs: ForwardOutputs, alignments: Alignments
    ) -> WeightingUpdate:
        """Move the means of the domains of this global batch."""
        self.reliability.observe(alignments.signal_to_noise)
        weights_Gn = self._group_weights(batch)
        advantage_Gn = self._advantage(alignments, weights_Gn)
        advantage_n = gather_over_data(self.grouping.local(advantage_Gn), self.runtime)
        by_domain: dict[str, list[float]] = defaultdict(list)
        for domain, value in zip(self._all_domains(batch), advantage_n.tolist(), strict=True):
            by_domain[domain].append(value)
        kept = self._kept()
        for domain, values in by_domain.items():
            mean = sum(values) / len(values)
            self.means[domain] = kept * self.means.get(domain, 0.0) + (1 - kept) * mean
        return WeightingUpdate(self.grouping.local(weights_Gn))

    def files(self) -> dict[str, bytes]:
        """The means as JSON, to be read by people."""
        text = json.dumps(self.means, indent=1, sort_keys=True)
        return {"domain_means.json": text.encode()}

    def state_dict(self) -> dict[str, Any]:
        """The means, and how far the alignments were reliable."""
        return {"means": dict(self.means), "reliability": self.reliability.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""
        self.means = dict(state["means"])
        self.reliability.value = state["reliability"]

    def _advantage(self, alignments: Alignments, weights_Gn: Tensor) -> Tensor:
        alignment_Gn = self.grouping.gather(alignments.values_n)
        if self.weighting.standardize:
            return standardize(alignment_Gn, weights_Gn)
        return centered(alignment_Gn * alignments.learning_rate, weights_Gn)

    def _kept(self) -> float:
        """The running mean's decay; noisy alignments move it less."""
        damping = self.reliability.factor if self.weighting.damp_by_noise else 1.0
        return 1.0 - (1.0 - self.config.domain_decay) * damping

    def _group_weights(self, batch: Batch) -> Tensor:
        means = [self.means.get(name, 0.0) for name in batch.domains]
        means_n = torch.tensor(means, dtype=torch.float32, device=self.runtime.device)
        return weights_from_logits(
            self.grouping.gather(means_n / self.config.domain_temperature),
            min_effective_sample_size=self.weighting.min_effective_sample_size,
            uniform_floor=self.weighting.uniform_floor,
        )

    def _all_domains(self, batch: Batch) -> list[str]:
        """Domains of the global batch, in order."""
        parts: list[tuple[str, ...]] = [()] * self.runtime.data_size
        dist.all_gather_object(parts, batch.domains, group=self.runtime.data_group)
        return [name for part in parts for name in part]
