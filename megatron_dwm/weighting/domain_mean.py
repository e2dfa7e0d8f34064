"""A baseline without a model: a running mean of alignments for every domain (METHOD.md, section 6).

A weighting model that reads the samples should do better than this.

    m_d <- decay * m_d + (1 - decay) * mean over the batch's samples of domain d of a_i
    w   =  the guarded softmax of m_domain(i) / temperature over the weighting group

Here a_i is the alignment s_i, standardized in the weighting group. With `weighting.standardize
false` it is eta * s_i minus the group's weighted mean, in nats of validation loss, and the
temperature must be about a hundred times smaller. A domain without samples so far has m_d = 0.
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
from megatron_dwm.weighting.advantage import advantages, known_groups
from megatron_dwm.weighting.concentration import GUARDS
from megatron_dwm.weighting.costs import Costs, Workload, learning_costs
from megatron_dwm.weighting.groups import Groups, gather_over_data, units_of_replicas
from megatron_dwm.weighting.method import (
    Alignments,
    Counters,
    WeightingUpdate,
)
from megatron_dwm.weighting.noise import Reliability
from megatron_dwm.weighting.rule_based import RuleBased
from megatron_dwm.weighting.rules import group_problems, learning_problems, target_problems
from megatron_dwm.weighting.schedule import Schedule, schedule_of


class DomainMean(RuleBased):
    """Weights from a running mean for every domain, the same on every rank."""

    gentler = f"{GUARDS}, or policy.domain_temperature"

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a target, updates from alignments, groups and the means."""
        learning = {"target", "passages", "updates", "hypergradients", "alignments"}
        return frozenset({*learning, "domain_mean", "groups", "softmax"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check the rules of the target, of groups and of learning."""
        yield from target_problems(config)
        yield from group_problems(config)
        yield from learning_problems(config, world_size)

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """Returns the schedule of `weighting.mode`."""
        return schedule_of(config)

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns the costs of learning without a weighting model."""
        return learning_costs(config, llm, workload, update_on=config.weighting.update_on)

    def __init__(
        self,
        config: PolicyConfig,
        weighting: WeightingConfig,
        runtime: Runtime,
        micro_batch_size: int,
    ) -> None:
        super().__init__(config, weighting, runtime, micro_batch_size)
        self.reliability = Reliability()
        self.means: dict[str, float] = {}

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], mean 1 in every weighting group; all 1 before the first update."""
        groups = self.grouping.of(batch)
        return groups.local(self._group_weights(batch, groups))

    @torch.no_grad()
    def update(
        self, batch: Batch, outputs: ForwardOutputs, alignments: Alignments
    ) -> WeightingUpdate:
        """Update the means of the domains in this global batch."""
        self.reliability.observe(alignments.signal_to_noise)
        groups = self.grouping.of(batch)
        weights_Gn = self._group_weights(batch, groups)
        advantage_Gn = advantages(
            alignments,
            weights_Gn,
            known_groups(groups, alignments),
            standardized=self.weighting.standardize,
        )
        advantage_n, kept = groups.local(advantage_Gn), self._kept()
        for domain, mean in self._means_by_domain(batch, advantage_n, alignments.known_n).items():
            self.means[domain] = kept * self.means.get(domain, 0.0) + (1 - kept) * mean
        return WeightingUpdate(groups.local(weights_Gn))

    def files(self) -> dict[str, bytes]:
        """Returns the means as JSON, for people to read."""
        text = json.dumps(self.means, indent=1, sort_keys=True)
        return {"domain_means.json": text.encode()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the means and the measured reliability of the alignments."""
        return {"means": dict(self.means), "reliability": self.reliability.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""
        self.means = dict(state["means"])
        self.reliability.value = state["reliability"]

    def _means_by_domain(
        self, batch: Batch, advantage_n: Tensor, known_n: Tensor | None
    ) -> dict[str, float]:
        """Returns the mean of every domain in the global batch, of known units (collective)."""
        counts, sizes_U = units_of_replicas(batch, self.runtime), batch.units.sizes_U
        sizes_U = torch.ones_like(advantage_n) if sizes_U is None else sizes_U
        sizes_U = sizes_U if known_n is None else sizes_U * known_n
        columns_N2 = gather_over_data(
            torch.stack([advantage_n, sizes_U], dim=1), self.runtime, counts
        )
        by_domain: dict[str, list[list[float]]] = defaultdict(list)
        for domain, row in zip(self._all_domains(batch), columns_N2.tolist(), strict=True):
            by_domain[domain].append(row)
        return {
            domain: sum(value * size for value, size in rows) / sum(size for _, size in rows)
            for domain, rows in by_domain.items()
            if any(size for _, size in rows)
        }

    def _kept(self) -> float:
        """Returns the fraction of the running mean that is kept; more if alignments are noisy."""
        damping = self.reliability.factor if self.weighting.damp_by_noise else 1.0
        return 1.0 - (1.0 - self.config.domain_decay) * damping

    def _group_weights(self, batch: Batch, groups: Groups) -> Tensor:
        means = [self.means.get(name, 0.0) for name in batch.domains]
        means_n = torch.tensor(means, dtype=torch.float32)
        means_n = means_n.to(self.runtime.device, non_blocking=True)
        return self.group_weights(means_n / self.config.domain_temperature, groups)

    def _all_domains(self, batch: Batch) -> list[str]:
        """Returns the domains of the global batch, in order (collective)."""
        parts: list[tuple[str, ...]] = [()] * self.runtime.data_size
        dist.all_gather_object(parts, batch.domains, group=self.runtime.data_group)
        return [name for part in parts for name in part]
