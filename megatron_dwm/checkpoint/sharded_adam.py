"""Loading Megatron-Core's sharded optimizer where torch's own Adam stands in for a fused one.

Without Transformer Engine and apex (every CPU) Megatron-Core 0.16.1's DistributedOptimizer cannot
load what it saved, for three reasons, all in optimizer/distrib_optimizer.py and all about `step`,
which torch keeps with every tensor. This file answers each; fused optimizers keep `step` with the
parameter group and pass through untouched.
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
    """Give Adam its state by a step on zero gradients; the load that follows overwrites it.

    `sharded_state_dict` reads `step` from state that is not there before the first step.
    """
    clear_gradients(llm, optimizer)
    optimizer.step()
    clear_gradients(llm, optimizer)


@contextmanager
def loadable(optimizer: ChainedOptimizer) -> Iterator[None]:
    """Within this context `optimizer.load_state_dict` works, and leaves sound state behind."""
    members = [m for m in optimizer.chained_optimizers if isinstance(m, DistributedOptimizer)]
    with ExitStack() as stack:
        for member in members:
            stack.enter_context(_step_kept(member))
        yield
    for member in members:
        _separate_steps(member)


@contextmanager
def _step_kept(member: DistributedOptimizer) -> Iterator[None]:
    """`_set_main_param_and_optimizer_states` wants a `step` among tensors that carry none."""
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
    """`load_state_dict` hands one `step` tensor to all: each step of Adam would add to it once for
    every parameter.
    """
    for state in member.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
