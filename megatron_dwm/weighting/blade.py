"""BLADE: selection by excess loss over a reference that follows the LLM (METHOD.md, section 4).

    min over theta, a of  L_val + lambda (L_train(a) - min_u L_train(a, u))        arXiv 2606.18650

The score of a unit is that of excess_loss.py, l_u(theta) - l_u(reference), and the fraction
`policy.keep_ratio` with the largest is kept. Every `policy.sync_interval_steps` steps the reference
is copied from the LLM and takes `policy.reference_steps` steps on its own objective
(dynamic_reference.py), each on a fresh batch, of which it keeps what the scores of the moment
choose. Then it stands still until the next copy. Before the first one all weights are equal. No
code of the authors is public; METHOD.md lists what their paper leaves open.

Cost of a reference step: two forward passes for the scores, and a training pass over batch and
passages. Cost of a step: the reference's forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, ForwardOutputs, LlamaShape, forward_only
from megatron_dwm.model.flops import FORWARD_BACKWARD, llm_forward_flops
from megatron_dwm.model.offload import Offload
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.weighting.costs import Costs, Workload
from megatron_dwm.weighting.dynamic_reference import DynamicReference
from megatron_dwm.weighting.excess_loss import ExcessLoss
from megatron_dwm.weighting.method import BuildContext, Counters, Needs, OwnUpdate
from megatron_dwm.weighting.rules import group_size_problems, target_problems
from megatron_dwm.weighting.schedule import Schedule


class Blade(ExcessLoss):
    """Keeps the units whose loss exceeds a dynamic reference's the most."""

    own_updates: ClassVar[bool] = True

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a target, a reference in training, a selection, and groups."""
        of_reference: frozenset[Part] = frozenset({"second_llm", "dynamic_reference", "passages"})
        return of_reference | {"target", "selection", "groups"}

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check that there is a target, and the rhythm of the reference."""
        policy = config.policy
        yield from target_problems(config)
        yield from group_size_problems(config)
        if policy.sync_interval_steps < policy.reference_steps:
            yield (
                f"policy.reference_steps {policy.reference_steps}: expected at most "
                f"policy.sync_interval_steps, which is {policy.sync_interval_steps}: the reference "
                "would train more than the LLM"
            )
        if policy.sync_first_step >= config.training.steps:
            yield (
                f"policy.sync_first_step {policy.sync_first_step}: expected less than "
                f"training.steps, which is {config.training.steps}: nothing would be selected"
            )

    @classmethod
    def depends_on(cls, config: Config) -> Iterator[tuple[str, Path]]:
        """Yields the target's file."""
        if config.validation.path is not None:
            yield "validation.path", Path(config.validation.path)

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """Returns the synchronizations, each with the steps of the reference that follow it."""
        policy, steps = config.policy, config.training.steps
        return Schedule(
            steps=steps,
            update_steps=range(policy.sync_first_step, steps, policy.sync_interval_steps),
            updates_each=policy.reference_steps,
            fresh=True,
        )

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """Returns the step of the first synchronization."""
        return cls.schedule(config).first_update

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns the costs of excess loss, and of the reference's steps."""
        costs = super().costs(config, llm, workload)
        passages = config.passages if workload.passages is None else workload.passages
        length, attended = config.data.sequence_length, workload.documents.attended_tokens
        validation = llm_forward_flops(llm, passages, length, attended)
        scores = 2 * costs.forward
        passes = scores + FORWARD_BACKWARD * (costs.forward + validation)
        return replace(costs, update_passes=passes)

    @classmethod
    def build(cls, context: BuildContext) -> Blade:
        """Build the method with an untrained reference, until the first synchronization."""
        config = context.config
        assert context.reference is not None and context.reference_optimizer is not None
        reference = DynamicReference(
            llm=context.reference,
            optimizer=context.reference_optimizer,
            learning_rate=config.policy.reference_learning_rate,
            penalty=config.policy.penalty,
            micro_batch_size=config.training.micro_batch_size,
        )
        return cls(config, reference, context.reference_offload)

    def __init__(self, config: Config, reference: DynamicReference, offload: Offload) -> None:
        super().__init__(config, reference.llm.runtime, reference.llm, offload)
        self.dynamic = reference
        self.synchronized = False

    def needs(self, counters: Counters) -> Needs:
        """Returns losses after the first synchronization, and nothing before it."""
        return super().needs(counters) if self.synchronized else Needs()

    def weighs(self, counters: Counters) -> bool:
        """True after the first synchronization."""
        return self.synchronized

    def reference_losses(self, batch: Batch) -> Tensor | None:
        """Returns float32 [n], the reference's losses; None before the first synchronization."""
        return super().reference_losses(batch) if self.synchronized else None

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], mean 1 in every group; all 1 before the first synchronization."""
        if not self.synchronized:
            return torch.ones(batch.units.count, device=batch.tokens_BS.device)
        return super().weights(batch, outputs, counters)

    def own_update(
        self, llm: LLM, batch: Batch, passages: Batch, counters: Counters
    ) -> OwnUpdate | None:
        """Take one step of the reference; the first of a synchronization copies the LLM before."""
        with self.offload.learning():
            return self._own_update(llm, batch, passages, counters)

    def _own_update(
        self, llm: LLM, batch: Batch, passages: Batch, counters: Counters
    ) -> OwnUpdate | None:
        if counters.stage_updates == 0 or not self.synchronized:
            self.dynamic.copy_from(llm)
            self.synchronized = True
        losses_n = forward_only(llm, unit(batch, self.micro_batch_size)).unit_losses_n
        outputs = ForwardOutputs(losses_n=losses_n, reference_losses_n=self.reference_losses(batch))
        weights_n = self.weights(batch, outputs, counters)
        found = self.dynamic.learn(batch, weights_n, passages)
        if not math.isfinite(found.grad_norm):
            return None
        return OwnUpdate(
            losses_n=losses_n,
            weights_n=weights_n,
            val_loss=found.val_loss,
            grad_norm=found.grad_norm,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns whether there was a synchronization; the checkpoint has the reference itself."""
        return {"synchronized": self.synchronized}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""
        self.synchronized = state["synchronized"]
