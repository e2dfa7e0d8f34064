"""Methods outside the package, for tests of runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.plugin import (
    Alignments,
    Batch,
    BuildContext,
    Config,
    Costs,
    Counters,
    ForwardOutputs,
    LlamaShape,
    Method,
    Needs,
    Part,
    PassSoftmax,
    RuleBased,
    Schedule,
    WeightingUpdate,
    Workload,
    advantages,
    gather_over_data,
    group_problems,
    known_groups,
    learning_costs,
    learning_problems,
    schedule_of,
    target_problems,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How fast `Parity` learns."""

    rate: float = 0.5
    """part of an advantage that an update adds"""


class Parity(RuleBased):
    """Learns from alignments how samples with even numbers should weigh beside odd ones."""

    contract_version = 1
    options = Options
    units = frozenset({"sample"})
    learns_from_alignments = True
    rate: float
    logit: float = 0.0

    @classmethod
    def build(cls, context: BuildContext) -> Parity:
        """Build the method with the run's options."""
        method = super().build(context)
        assert isinstance(method, Parity)
        method.rate = cls.own_options(context.config).rate
        return method

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts of a method that learns from alignments."""
        learning = {"target", "passages", "updates", "hypergradients", "alignments"}
        return frozenset({*learning, "groups", "softmax"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check the target, groups and learning."""
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
        return learning_costs(config, llm, workload, update_on=config.update_on)

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], mean 1 in every weighting group."""
        groups = self.grouping.of(batch)
        return groups.local(self.group_weights(self.logit * _signs(batch), groups))

    @torch.no_grad()
    def update(
        self, batch: Batch, outputs: ForwardOutputs, alignments: Alignments
    ) -> WeightingUpdate:
        """Move the logit by the mean advantage of even samples less that of odd ones."""
        groups = self.grouping.of(batch)
        weights_Gn = self.group_weights(self.logit * _signs(batch), groups)
        known = known_groups(groups, alignments)
        advantage_n = groups.local(advantages(alignments, weights_Gn, known, standardized=True))
        if alignments.known_n is not None:
            advantage_n = advantage_n * alignments.known_n
        self.logit += self.rate * float(
            gather_over_data(advantage_n * _signs(batch), self.runtime).mean()
        )
        return WeightingUpdate(groups.local(weights_Gn))

    def state_dict(self) -> dict[str, Any]:
        """Returns the logit."""
        return {"logit": self.logit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""
        self.logit = state["logit"]


class Unsaved(Parity):
    """Its state has an object that no checkpoint can be loaded with."""

    def state_dict(self) -> dict[str, Any]:
        """Returns a device among the values."""
        return {"logit": self.logit, "where": [Options()]}


class Rewritten(Parity):
    """Its code no longer fits the state that it saves."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Expects a tensor, where the state has a number."""
        self.logit = state["logit"].item()


class Louder(PassSoftmax):
    """Units with a larger loss weigh more; over the global batch it divides after the pass."""

    contract_version = 1

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """Returns 0."""
        return 0

    def needs(self, counters: Counters) -> Needs:
        """Returns losses."""
        return self.pass_needs(losses=True)

    def weighs(self, counters: Counters) -> bool:
        """True in every step."""
        return True

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns the softmax of the losses."""
        assert outputs is not None
        return self.softmax(2.0 * outputs.losses_n, batch)


class Twice(Method):
    """Its weights have the mean 2."""

    contract_version = 1

    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns twos."""
        del outputs, counters
        return torch.full((batch.size,), 2.0)


def _signs(batch: Batch) -> Tensor:
    """Returns float32 [n]: 1 for even samples, -1 for odd ones."""
    return 1.0 - 2.0 * (batch.sample_ids_B % 2).float()
