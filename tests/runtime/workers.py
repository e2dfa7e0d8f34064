"""Functions that the ranks of the runtime tests run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_dwm.config import ParallelConfig
from megatron_dwm.runtime import Runtime, bring_up, start
from megatron_dwm.runtime.random_state import random_state, restore_random_state
from megatron_dwm.testing import plain_step, random_batch, tiny_learner


def timeouts_s(tensor: int, pipeline: int, timeout_s: int) -> list[float]:
    """Returns the timeout of every process group of this rank, as torch keeps it."""
    config = ParallelConfig(tensor=tensor, pipeline=pipeline, timeout_s=timeout_s)
    with bring_up(config, seed=0):
        backends = [
            group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map
        ]
        return [backend.options._timeout.total_seconds() for backend in backends]


def losses(pipeline: int, in_a_block: bool) -> list[float]:
    """Returns the losses of three steps, in a `with` block or between `start` and `close`."""
    config = ParallelConfig(pipeline=pipeline)
    if in_a_block:
        with bring_up(config, seed=1) as runtime:
            found = _losses(runtime, config)
            runtime.close()  # the block ends it
            assert dist.is_initialized()
            return found
    runtime = start(config, seed=1)
    found = _losses(runtime, config)
    runtime.close()
    runtime.close()  # nothing is left to do
    assert not dist.is_initialized()
    return found


def forked_after_a_gpus_state() -> tuple[bool, bool]:
    """Whether generators go on after a GPU's state and are restored by their own."""
    with bring_up(ParallelConfig(), seed=1):
        own = random_state()
        of_gpu = {name: torch.zeros(16, dtype=torch.uint8) for name in own["megatron"]}
        first = _drawn()
        restore_random_state({**own, "cuda": torch.zeros(16), "megatron": of_gpu})
        second = _drawn()
        restore_random_state(own)
        return not torch.equal(first, second), torch.equal(first, _drawn())


def _drawn() -> torch.Tensor:
    with get_cuda_rng_tracker().fork():
        return torch.rand(3)


def _losses(runtime: Runtime, config: ParallelConfig) -> list[float]:
    learner = tiny_learner(runtime, parallel=config)
    batches = [random_batch(number, runtime, rows=8) for number in range(3)]
    return [
        float(plain_step(learner.llm, learner.optimizer, batch, learner.micro_batch_size))
        for batch in batches
    ]
