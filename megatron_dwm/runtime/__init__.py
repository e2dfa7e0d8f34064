"""Devices, process groups and Megatron-Core on a CPU; only this folder uses parallel_state."""

from megatron_dwm.runtime.bring_up import (
    Runtime,
    bring_up,
    rank_from_environment,
    runtime_of_running_job,
    start,
    world_size_from_environment,
)
from megatron_dwm.runtime.groups import tensor_context_group

__all__ = [
    "Runtime",
    "bring_up",
    "rank_from_environment",
    "runtime_of_running_job",
    "start",
    "tensor_context_group",
    "world_size_from_environment",
]
