"""Loads Megatron-Core's sharded optimizer when its Adam is torch's and not a fused one.

Without Transformer Engine and apex (on every CPU) the DistributedOptimizer of Megatron-Core 0.16.1
cannot load what it saved. There are three reasons, all in optimizer/distrib_optimizer.py and all
about `step`, which torch stores for every tensor. This file works around each. Fused optimizers
store `step` in the parameter group and need no workaround.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.nn import Parameter

from megatron_dwm.model import LLM, clear_gradients


def create_state(llm: LLM, optimizer: ChainedOptimizer) -> None:
    """Create Adam's state with a step on zero gradients; the load that follows overwrites it.

    `sharded_state_dict` reads `step` from state that does not exist before the first step.
    """
    clear_gradients(llm, optimizer)
    optimizer.step()
    clear_gradients(llm, optimizer)


@contextmanager
def loadable(optimizer: ChainedOptimizer) -> Iterator[None]:
    """Make `optimizer.load_state_dict` work inside this context."""
    members = [m for m in optimizer.chained_optimizers if isinstance(m, DistributedOptimizer)]
    with ExitStack() as stack:
        for member in members:
            stack.enter_context(_step_kept(member))
        yield
    for member in members:
        _separate_steps(member)


@contextmanager
def _step_kept(member: DistributedOptimizer) -> Iterator[None]:
    """Add the `step` that `_set_main_param_and_optimizer_states` needs and tensors lack."""
    upstream = member._set_main_param_and_optimizer_states

    def with_step(parameter: Parameter, tensors: dict[str, Any]) -> None:
        group, order = member.model_param_group_index_map[parameter]
        main = member.optimizer.param_groups[group]["params"][order]
        own = member.optimizer.state[main]
        upstream(parameter, {"step": own["step"], **tensors} if "step" in own else tensors)

    member._set_main_param_and_optimizer_states = with_step
    try:
        yield
    finally:
        del member._set_main_param_and_optimizer_states


def _separate_steps(member: DistributedOptimizer) -> None:
    """Give every parameter its own `step` tensor.

    `load_state_dict` gives all parameters the same one, and each would add 1 to it in every step.
    """
    for state in member.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
