"""A virtual step of the LLM's optimizer, its reversal, and z (METHOD.md, sections 2 and 3).

    theta' = theta - lr * (u(c*g) + weight_decay * theta)     g in the gradient buffers
    z      = d(c*g)/dg^T  J(c*g)  grad L_val(theta')          c: global-norm clipping

The moments are only read. Memory: a copy of g, and in pure fp32 training a copy of theta (in mixed
precision the fp32 main parameters are that copy). After `restore` and `restore_gradient` every bit
is as it was before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor
from torch.nn import Module

from megatron_dwm.bilevel.problem import InnerOptimizer
from megatron_dwm.bilevel.slots import (
    Slot,
    collect_slots,
    gather_parameters,
    is_sharded,
    publish_gradients,
    slice_of_z,
    write_gradients,
)
from megatron_dwm.bilevel.update_rules import UPDATE_RULES, UpdateRule
from megatron_dwm.model import WrappedModel, invalidate_weight_caches
from megatron_dwm.model.layers.transformer_engine import (
    ScalingState,
    read_scaling_state,
    write_scaling_state,
)

# megatron.core.optimizer.clip_grads.clip_grad_by_total_norm_fp32 divides by the norm plus this.
CLIP_EPSILON = 1e-6


@dataclass(frozen=True)
class VirtualStep:
    """A virtual step: `enter` takes it, `restore` reverses it.

    gradients: g, tensor by tensor, before clipping.
    parameters: theta of the slots without a main copy; None for the others.
    grad_norm: |g| before clipping.  clip_factor: c, 1 if clipping is not active.
    scaling_state: scales and maxima of the delayed FP8 recipe; empty for other recipes.
    """

    llm: WrappedModel
    optimizer: ChainedOptimizer
    rule: UpdateRule
    slots: list[Slot]
    gradients: list[Tensor]
    parameters: list[Tensor | None]
    grad_norm: float
    clip_factor: float
    scaling_state: dict[Module, ScalingState | None]

    @torch.no_grad()
    def enter(self) -> None:
        """Write theta' into the model's parameters."""
        for slot, gradient in zip(self.slots, self.gradients, strict=True):
            slot.model.copy_(self.rule.step(slot, self._clipped(gradient)))
        self._publish()

    @torch.no_grad()
    def restore(self, *, alone: bool = False) -> None:
        """Write theta back into the model's parameters, bit for bit.

        alone: other ranks may not come here, because this one has failed. Then parts of a sharded
            optimizer's other ranks keep theta', unless there is one process.
        """
        for slot, kept in zip(self.slots, self.parameters, strict=True):
            slot.model.copy_(slot.main if kept is None else kept)
        if alone and self.llm.runtime.world_size > 1:
            invalidate_weight_caches(self.llm)
        else:
            self._publish()

    @torch.no_grad()
    def direction(self) -> None:
        """Turn grad L_val(theta') in the gradient buffers into z, in place, on every rank."""
        self.optimizer.prepare_grads()
        for slot, gradient in zip(self.slots, self.gradients, strict=True):
            cotangent = slot.gradient
            pulled_back = self.rule.pullback(slot, self._clipped(gradient), cotangent)
            if pulled_back is not cotangent:
                cotangent.copy_(pulled_back)
        if self.clip_factor < 1.0:
            self._pull_back_clipping()
        publish_gradients(self.llm, self.optimizer, self.slots)

    @torch.no_grad()
    def jacobian(self) -> dict[int, Tensor]:
        """Returns c J at g, the diagonal part of d(step)/dg, for this rank's parameters, by id.

        It leaves out that the clipping factor changes with g. The gradient buffers are overwritten.
        """
        for slot, gradient in zip(self.slots, self.gradients, strict=True):
            ones = slot.gradient.fill_(1.0)
            ones.copy_(self.rule.pullback(slot, self._clipped(gradient), ones))
            ones.mul_(self.clip_factor)
        publish_gradients(self.llm, self.optimizer, self.slots)
        return {id(p): slice_of_z(p).to(torch.float32, copy=True) for p in self.llm.parameters()}

    @torch.no_grad()
    def restore_gradient(self) -> None:
        """Write g back over z in the gradient buffers, bit for bit, and restore the FP8 scales."""
        for slot, gradient in zip(self.slots, self.gradients, strict=True):
            slot.gradient.copy_(gradient)
        write_gradients(self.slots)
        write_scaling_state(self.scaling_state)

    def _clipped(self, gradient: Tensor) -> Tensor:
        return gradient * self.clip_factor if self.clip_factor < 1.0 else gradient

    def _pull_back_clipping(self) -> None:
        """z <- d(c*g)/dg^T z with c = C/(|g| + epsilon), |g| over the whole model."""
        norm, factor = self.grad_norm, self.clip_factor
        projection = factor * self._inner_product() / (norm * (norm + CLIP_EPSILON))
        for slot, gradient in zip(self.slots, self.gradients, strict=True):
            slot.gradient.mul_(factor).sub_(gradient, alpha=projection)

    def _inner_product(self) -> float:
        """Returns <z, g>, in which every parameter of the model counts once."""
        total = torch.zeros([], dtype=torch.float64, device=self.llm.runtime.device)
        for slot, gradient in zip(self.slots, self.gradients, strict=True):
            if slot.counted:
                total += torch.sum(slot.gradient.double() * gradient)
        group = self.optimizer.chained_optimizers[0].get_grad_stats_parallel_group()
        dist.all_reduce(total, group=group)
        return float(total)

    def _publish(self) -> None:
        if is_sharded(self.optimizer):
            gather_parameters(self.llm)
        invalidate_weight_caches(self.llm)


@torch.no_grad()
def prepare_virtual_step(
    llm: WrappedModel, optimizer: ChainedOptimizer, inner: InnerOptimizer
) -> VirtualStep:
    """Prepare the step along the gradient in the gradient buffers; parameters keep their values."""
    optimizer.prepare_grads()
    grad_norm, clip = optimizer.get_grad_norm(), optimizer.config.clip_grad
    # With a kernel of Transformer Engine 2.14's, Megatron-Core 0.17 and later have a tensor here.
    factor = min(1.0, float(clip / (grad_norm + CLIP_EPSILON))) if clip > 0.0 else 1.0
    slots = collect_slots(optimizer)
    gradients = [slot.gradient.clone() for slot in slots]
    parameters = [None if slot.has_main_copy else slot.main.clone() for slot in slots]
    return VirtualStep(
        llm,
        optimizer,
        UPDATE_RULES[inner],
        slots,
        gradients,
        parameters,
        float(grad_norm),
        factor,
        _scaling_state(llm),
    )


@contextmanager
def kept_scales(llm: WrappedModel) -> Iterator[None]:
    """Restore the scales and maxima of the delayed FP8 recipe after passes that change them."""
    found = _scaling_state(llm)
    yield
    write_scaling_state(found)


def _scaling_state(llm: WrappedModel) -> dict[Module, ScalingState | None]:
    config = llm.transformer
    delayed = config.fp8 is not None and config.fp8_recipe == "delayed"
    return read_scaling_state(llm.modules) if delayed else {}
