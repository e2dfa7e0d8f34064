"""The guarded softmax of logits that the LLM's own pass gives, one unit at a time.

Over the global batch it is divided after the pass (deferred_softmax.py), unless
`weighting.normalizer` is first: then a batch of several micro-batches is read once more before it
has weights. Inside a micro-batch its weights are known in the pass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.config import Config, WeightingConfig
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.model import LlamaShape
from megatron_dwm.runtime.warn import print_warning
from megatron_dwm.weighting.costs import Costs, Workload, reading_costs
from megatron_dwm.weighting.deferred_softmax import DeferredSoftmax
from megatron_dwm.weighting.method import Counters, Needs
from megatron_dwm.weighting.rule_based import RuleBased

SOFTMAX_PARTS: frozenset[Part] = frozenset({"groups", "softmax", "normalizer"})
"""the parts of every such method"""

_OLDER = (
    "the checkpoint's run divided weights before the pass; from here on they are divided after it; "
    "to go on as before, set weighting.normalizer first and --run.allow_changed "
    "weighting.normalizer"
)


class PassSoftmax(RuleBased):
    """A rule whose logit for a unit depends on no other unit of the batch."""

    @cached_property
    def deferred(self) -> DeferredSoftmax | None:
        """What divides after the pass; None if weights are divided before it."""
        if not _defers(self.weighting):
            return None
        return DeferredSoftmax(
            min_effective_sample_size=self.weighting.min_effective_sample_size,
            uniform_floor=self.weighting.uniform_floor,
        )

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts that such methods share; add those of yours."""
        return SOFTMAX_PARTS

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns plain costs, and a forward pass of every batch that is read first."""
        costs = reading_costs(config, llm, workload)
        if not _defers(config.weighting):
            return costs
        return replace(costs, extra_forward=0.0, first_forward=costs.forward)

    def before_step(self, counters: Counters) -> None:
        """Keep the temperature of the coming pass."""
        if self.deferred is not None:
            self.deferred.begin_step()

    def pass_needs(self, *, losses: bool = False, early_layer: int | None = None) -> Needs:
        """Returns these needs, with what the groups ask for.

        The first batch that is weighed sets the temperature, which every rank keeps.
        """
        assert losses or early_layer is not None, "weights in the pass need something of it"
        ready = self.deferred is not None and self.deferred.is_ready
        return Needs(
            losses=losses,
            early_layer=early_layer,
            whole_batch=self.grouping.is_global and not ready,
            on_every_rank=self.deferred is not None and not ready,
            relative=ready,
        )

    def softmax(self, logits_n: Tensor, batch: Batch) -> Tensor:
        """Returns float32 [n] of mean 1 in every group, or relative ones if `pass_needs` says so.

        logits_n: of this replica's units, or of those of a micro-batch.
        """
        if self.deferred is not None and self.deferred.is_ready:
            return self.deferred.relative(logits_n)
        groups = self.grouping.of(batch)
        if self.deferred is not None:
            self.deferred.settle_first(groups.gather(logits_n), groups.sizes_Gn)
        return groups.local(self.group_weights(logits_n, groups))

    @torch.no_grad()
    def after_weighing(self, batch: Batch, relative_n: Tensor) -> None:
        """Set the next step's temperature (collective)."""
        assert self.deferred is not None
        groups = self.grouping.of(batch)
        self.deferred.observe(groups.gather(relative_n), groups.sizes_Gn)

    def step_statistics(self) -> dict[str, Tensor]:
        """Returns the softmax's temperature for the next step, and the drift of the last one's."""
        return {} if self.deferred is None else self.deferred.statistics()

    def state_dict(self) -> dict[str, Any]:
        """Returns the temperature and the scale of the next step."""
        return {} if self.deferred is None else {"deferred": self.deferred.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`; without any, the next batch is read first."""
        if self.deferred is None:
            return
        if "deferred" not in state:
            print_warning(_OLDER)
        self.deferred.load_state_dict(state.get("deferred", {}), self.runtime.device)


def _defers(weighting: WeightingConfig) -> bool:
    return weighting.group == "global" and weighting.normalizer == "deferred"
