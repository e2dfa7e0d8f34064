"""Devices, process groups and the CPU bring-up; the only folder that knows parallel_state."""

from megatron_dwm.runtime.bring_up import (
    Runtime,
    bring_up,
    rank_from_environment,
    world_size_from_environment,
)

__all__ = ["Runtime", "bring_up", "rank_from_environment", "world_size_from_environment"]
