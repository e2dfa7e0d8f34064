"""The optimizer's view of the parameters, under Megatron-Core's three optimizers.

FP32Optimizer steps the model's parameters themselves; Float16OptimizerWithFloat16Params steps fp32
main copies; DistributedOptimizer steps this rank's shard of either. A `Slot` hides
the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_dwm.bilevel.adam import AdamMoments
from megatron_dwm.model import WrappedModel


@dataclass(frozen=True)
class Slot:
    """One tensor that the optimizer steps.

    main: fp32 values that are stepped; `main.grad` is a view of Megatron's gradient buffer, or an
        fp32 copy of it if the buffer is in bf16.
    model: the same elements of the model's parameter; `main` itself in pure fp32 training.
    group: the optimizer's parameter group (lr, weight_decay, betas, eps).
    state: the optimizer's state of `main`; empty before the first step.
    counted: True if this rank's copy counts in norms and inner products; each parameter counts once
        in the world.
    buffer: the same elements of a gradient buffer in bf16; None if the buffer is in fp32.
    """

    main: Tensor
    model: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    counted: bool
    buffer: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """The gradient of `main`; `publish_gradients` makes a change known to all ranks."""
        assert self.main.grad is not None
        return self.main.grad

    @property
    def has_main_copy(self) -> bool:
        """True if main and model values are different tensors (mixed precision)."""
        return self.main is not self.model

    def moments(self) -> AdamMoments:
        """Returns Adam's moments, which are zero before the first step."""
        first = self.state.get("exp_avg")
        second = self.state.get("exp_avg_sq")
        # torch keeps the step count with the tensor, fused implementations keep it with the group.
        step = self.state.get("step", self.group.get("step", 0))
        beta1, beta2 = self.group["betas"]
        return AdamMoments(
            first=torch.zeros_like(self.main) if first is None else first,
            second=torch.zeros_like(self.main) if second is None else second,
            step=int(step),
            beta1=beta1,
            beta2=beta2,
            epsilon=self.group["eps"],
        )


def collect_slots(optimizer: ChainedOptimizer) -> list[Slot]:
    """Returns a slot for every tensor that this rank's optimizer steps."""
    return [slot for member in optimizer.chained_optimizers for slot in _slots_of(member)]


def _slots_of(member: MegatronOptimizer) -> list[Slot]:
    if member.is_stub_optimizer:
        return []
    model_of, buffer_of = _model_tensors(member), _buffers_below_fp32(member)
    return [
        Slot(
            main=main,
            model=model_of.get(id(main), main),
            group=group,
            state=member.optimizer.state.get(main, {}),
            counted=param_is_not_shared(main)
            and param_is_not_tensor_parallel_duplicate(main, member.tp_group),
            buffer=buffer_of.get(id(main)),
        )
        for group in member.optimizer.param_groups
        for main in group["params"]
    ]


def _model_tensors(member: MegatronOptimizer) -> dict[int, Tensor]:
    """Returns the model's tensor by id(main copy), for those that differ."""
    if isinstance(member, DistributedOptimizer):
        pairs = zip(member.shard_fp32_from_float16_groups, member.shard_float16_groups, strict=True)
    elif isinstance(member, Float16OptimizerWithFloat16Params):
        pairs = zip(member.fp32_from_float16_groups, member.float16_groups, strict=True)
    else:
        return {}
    return {
        id(main): model.data
        for main_group, model_group in pairs
        for main, model in zip(main_group, model_group, strict=True)
    }


def _buffers_below_fp32(member: MegatronOptimizer) -> dict[int, Tensor]:
    """Returns the part of the gradient buffer by id(main copy), where the buffer is not in fp32."""
    if isinstance(member, DistributedOptimizer):
        groups, mains = member.model_float16_groups, member.shard_fp32_from_float16_groups
    elif isinstance(member, Float16OptimizerWithFloat16Params):
        groups, mains = member.float16_groups, member.fp32_from_float16_groups
    else:
        return {}
    found = {}
    for models, main_group in zip(groups, mains, strict=True):
        for model, main in zip(models, main_group, strict=True):
            if model.main_grad.dtype == torch.float32:
                continue
            found[id(main)] = model.main_grad.view(-1)
            if isinstance(member, DistributedOptimizer):
                part = member._get_model_param_range_map(model)["param"]
                found[id(main)] = found[id(main)][part.start : part.end]
    return found


# a model parameter -> its slice of z
SliceOfZ = Callable[[Any], Tensor]


def slice_of_z(parameter: Any) -> Tensor:
    """Returns the slice of z that belongs to a model parameter: its part of the gradient buffer."""
    return parameter.main_grad


def is_sharded(optimizer: ChainedOptimizer) -> bool:
    """True if the optimizer's state is sharded over the ranks with the same parameters."""
    return any(isinstance(m, DistributedOptimizer) for m in optimizer.chained_optimizers)


def gather_parameters(llm: WrappedModel) -> None:
    """Gather the model parameters from the shards of all ranks that share them (collective)."""
    for chunk in llm.chunks:
        chunk.start_param_sync(force_sync=True)


def publish_gradients(
    llm: WrappedModel, optimizer: ChainedOptimizer, slots: Sequence[Slot]
) -> None:
    """Bring the slots' gradients into the gradient buffers of all ranks (collective if sharded).

    A buffer in bf16 rounds them.
    """
    write_gradients(slots)
    if is_sharded(optimizer):
        _gather_gradient_buffers(llm)


def write_gradients(slots: Sequence[Slot]) -> None:
    """Write the slots' gradients into this rank's part of the buffers, which may be in bf16."""
    for slot in slots:
        if slot.buffer is not None:
            slot.buffer.copy_(slot.gradient.view(-1))


def _gather_gradient_buffers(llm: WrappedModel) -> None:
    """Gather the gradient buffers from the shards of all ranks that share them (collective)."""
    group = llm.runtime.data_context_group
    for chunk in llm.chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)
