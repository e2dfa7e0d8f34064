"""Functions that the ranks of the runtime tests run."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_dwm.config import ParallelConfig
from megatron_dwm.runtime import bring_up


def timeouts_s(tensor: int, pipeline: int, timeout_s: int) -> list[float]:
    """Returns the timeout of every process group of this rank, as torch keeps it."""
    config = ParallelConfig(tensor=tensor, pipeline=pipeline, timeout_s=timeout_s)
    with bring_up(config, seed=0):
        backends = [
            group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map
        ]
        return [backend.options._timeout.total_seconds() for backend in backends]
