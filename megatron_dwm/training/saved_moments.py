"""Loads Adam's moments that Megatron-LM saved, into any of Megatron-Core's three optimizers.

The moments of a parameter have its name and its layout. They pass through the gradient buffers,
from which every optimizer takes the part that it steps (bilevel/slots.py). Cost: reading them, and
the memory of one tensor.
"""

from __future__ import annotations

import torch

from megatron_dwm.bilevel.coordinates import named_parameters
from megatron_dwm.bilevel.slots import Slot, collect_slots, slice_of_z
from megatron_dwm.model import clear_gradients
from megatron_dwm.model.initialize import slice_of_rank
from megatron_dwm.model.on_disk.megatron_files import MAIN, MOMENTS, MegatronModel
from megatron_dwm.training.learner import Learner


@torch.no_grad()
def load_moments(learner: Learner, source: MegatronModel) -> None:
    """Load Adam's moments and step count and, in mixed precision, the fp32 parameters (collective).

    Adam's state must exist (checkpoint/sharded_adam.py), and the parameters be those of `source`.
    The step count is the number of the iteration. Gradient buffers have to be in fp32; they are
    zero afterwards.
    """
    for kind in MOMENTS:
        for slot in _with_gradients(learner, source, kind):
            slot.state[kind].copy_(slot.gradient.view_as(slot.main))
    if source.has(MAIN):
        for slot in _with_gradients(learner, source, MAIN):
            slot.main.copy_(slot.gradient.view_as(slot.main))
    clear_gradients(learner.llm, learner.optimizer)
    for slot in collect_slots(learner.optimizer):
        _set_step(slot, source.iteration)


def _with_gradients(learner: Learner, source: MegatronModel, kind: str) -> list[Slot]:
    """Returns the slots, whose gradients are what `source` has of this kind."""
    runtime = learner.runtime
    clear_gradients(learner.llm, learner.optimizer)
    for name, parameter in named_parameters(learner.llm):
        whole = source.read(name, kind)
        mine = slice_of_rank(whole, parameter, runtime.tensor_rank, runtime.tensor_size)
        slice_of_z(parameter).copy_(mine)  # the gradient buffer's part
    learner.optimizer.prepare_grads()
    slots = collect_slots(learner.optimizer)
    assert all(slot.buffer is None for slot in slots), "gradient buffers in bf16 would round"
    return slots


def _set_step(slot: Slot, step: int) -> None:
    """Set the count where this Adam keeps it: torch's with the tensor, fused ones in the group."""
    if "step" in slot.state:
        slot.state["step"] = torch.full_like(slot.state["step"], step)
    else:
        slot.group["step"] = step
