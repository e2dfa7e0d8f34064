"""Weights straight from the alignments of the batch at hand, which DWM's model only predicts.

    s_i = <z, grad l_i(theta)>  at uniform weights on this batch (METHOD.md, section 2)
    w   = the guarded softmax of (s - mean s) / (deviation of s) / temperature over the group

With `policy.alignment_choice greedy` the units of a group are chosen one by one instead, by s_i
less the overlap of their steps with those already chosen (greedy.py), and those weigh the same.

With `policy.alignment_decay` mean and deviation are those of the global batches so far, from
running means m and q of s and s^2: m <- decay m + (1 - decay) * mean of s, deviation^2 = q - m^2.

Nothing else is kept from step to step. A step computes g at uniform weights, the virtual step, the
validation gradient and the alignments, and then the weighted gradient of the same batch. The
alignments are exact for this batch and hold for no other one, so the steps between
(`policy.alignment_interval`) have uniform weights. So have the first `policy.alignment_warmup`
steps, since Adam's J is near zero while its moments are empty.

Cost: three more plain steps in every step with alignments; for overlaps a third of one more, since
the pass of the alignments also sketches every unit's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.model import ForwardOutputs, LlamaShape
from megatron_dwm.weighting.concentration import GUARDS
from megatron_dwm.weighting.costs import Costs, Workload, learning_costs
from megatron_dwm.weighting.greedy import choose_greedily, in_deviations, overlaps
from megatron_dwm.weighting.groups import Groups
from megatron_dwm.weighting.method import Counters
from megatron_dwm.weighting.moments import global_moments
from megatron_dwm.weighting.rule_based import RuleBased
from megatron_dwm.weighting.rules import (
    estimator_problems,
    group_problems,
    group_size_problems,
    target_problems,
)
from megatron_dwm.weighting.schedule import Schedule
from megatron_dwm.weighting.standardize import standardize
from megatron_dwm.weighting.top_fraction import keep_largest, number_kept, weights_of_kept


class GradientAlignment(RuleBased):
    """Weights from the hypergradient at uniform weights."""

    gentler = (
        f"{GUARDS}, or policy.alignment_temperature; policy.keep_ratio if the choice is greedy"
    )
    aligns_first: ClassVar[bool] = True
    # Means of s and of s^2, float64 [2]; those of a step count once it was taken.
    moments: Tensor | None = None
    _next_moments: Tensor | None = None

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a target, hypergradients, groups, and a softmax or a choice."""
        reads = {"target", "passages", "hypergradients", "gradient_alignment", "groups"}
        reads |= {"aligned_steps"}
        is_greedy = config.policy.alignment_choice == "greedy"
        return frozenset(reads | ({"selection", "redundancy"} if is_greedy else {"softmax"}))

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check the rules of the target, of groups, of the estimator and of sketches."""
        yield from target_problems(config)
        is_greedy = config.policy.alignment_choice == "greedy"
        yield from (group_size_problems if is_greedy else group_problems)(config)
        yield from estimator_problems(config, world_size)
        if is_greedy and config.policy.redundancy and config.bilevel.estimator != "tangent_probe":
            yield (
                f"policy.redundancy {config.policy.redundancy:g}: bilevel.estimator "
                f"{config.bilevel.estimator} forms no sketches of the units' steps; use "
                "tangent_probe, or set policy.redundancy to 0"
            )

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """Returns an update inside the first step after the warm-up, and then every interval."""
        policy, steps = config.policy, config.training.steps
        inside = range(policy.alignment_warmup + 1, steps + 1, policy.alignment_interval)
        return Schedule(steps=steps, update_steps=inside, in_step=True)

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns the costs of updates with a pass for g at uniform weights, and of sketches."""
        costs, policy = learning_costs(config, llm, workload, update_on="fresh"), config.policy
        if policy.alignment_choice != "greedy" or not policy.redundancy:
            return costs
        return replace(costs, update_passes=costs.update_passes + costs.forward)

    @property
    def sketch_size(self) -> int | None:  # type: ignore[override]
        """Size of the sketches of the units' steps; None if overlaps do not count."""
        greedy = self.config.alignment_choice == "greedy" and self.config.redundancy > 0.0
        return self.config.sketch_size if greedy else None

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], mean 1 in every weighting group; all 1 without alignments."""
        self._next_moments = None  # of an aligned step that was skipped
        if outputs is None or outputs.alignment_n is None:
            return torch.ones(batch.units.count, device=batch.tokens_BS.device)
        groups = self.grouping.of(batch)
        alignment_Gn = groups.gather(outputs.alignment_n)
        if self.config.alignment_choice == "greedy":
            return groups.local(self._chosen(alignment_Gn, outputs.overlap_nK, groups))
        standard_Gn = self._standardized(alignment_Gn, batch, outputs.alignment_n, groups)
        logits_n = groups.local(standard_Gn) / self.config.alignment_temperature
        return groups.local(self.group_weights(logits_n, groups))

    def after_step(self, batch: Batch, losses_n: Tensor, counters: Counters) -> None:
        """Keep the moments with this step's alignments, now that it was taken."""
        if self._next_moments is not None:
            self.moments, self._next_moments = self._next_moments, None

    def state_dict(self) -> dict[str, Any]:
        """Returns the running moments."""
        return {"moments": None if self.moments is None else self.moments.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""
        moments, self._next_moments = state["moments"], None
        if moments is not None:
            moments = torch.tensor(moments, dtype=torch.float64, device=self.runtime.device)
        self.moments = moments

    def _standardized(
        self, alignment_Gn: Tensor, batch: Batch, alignment_n: Tensor, groups: Groups
    ) -> Tensor:
        """Returns [G, n], by the group's own mean and deviation, or the running ones."""
        if not self.config.alignment_decay:
            return standardize(alignment_Gn, sizes_Gn=groups.sizes_Gn)
        found = global_moments(alignment_n, batch, self.runtime)
        if self.moments is not None:
            found = torch.lerp(found, self.moments, self.config.alignment_decay)
        self._next_moments = found
        mean, square = found
        deviation = (square - mean.square()).clamp(min=0.0).sqrt()
        centered_Gn = alignment_Gn.double() - mean
        return torch.where(deviation > 0, centered_Gn / deviation, 0.0).float()

    def _chosen(self, alignment_Gn: Tensor, overlap_nK: Tensor | None, groups: Groups) -> Tensor:
        """Returns [G, n]: weights of mean 1, equal for the units of the greedy choice, else 0."""
        ratio, sizes_Gn = self.config.keep_ratio, groups.sizes_Gn
        if overlap_nK is None:
            return keep_largest(alignment_Gn, sizes_Gn, ratio)
        sizes_Gn = torch.ones_like(alignment_Gn) if sizes_Gn is None else sizes_Gn
        counts_Gn = sizes_Gn > 0
        overlaps_Gnn = overlaps(groups.gather(overlap_nK))
        if self.config.overlap_unit == "deviation":
            overlaps_Gnn = in_deviations(overlaps_Gnn, alignment_Gn, counts_Gn)
        chosen_Gn = choose_greedily(
            alignment_Gn,
            overlaps_Gnn,
            counts_Gn,
            number_kept(counts_Gn, ratio),
            self.config.redundancy,
        )
        return weights_of_kept(chosen_Gn, sizes_Gn)
