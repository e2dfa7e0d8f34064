"""Places of parameters in the state of a sharded optimizer, if gradients have several buckets.

Megatron-Core pads the end of every bucket, so that the shards of all ranks are equal. For a
"fully_reshardable" checkpoint DistributedOptimizer gathers its state without that padding
(`get_parameter_state_dp_zero`), but cuts the parameters out of it at their places with the padding
(`sharded_param_state_fully_reshardable`): from the second bucket on, moments and main parameters
would be those of other parameters. Seen in 0.16.1 to 0.19.2; Megatron-LM's pull request 5077 fixes
it, and a release that has it does not need this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


@contextmanager
def places_without_padding(optimizer: ChainedOptimizer) -> Iterator[None]:
    """Let the buffers name the places of their parameters as if no bucket were padded."""
    members = optimizer.chained_optimizers
    buffers: list[Any] = [
        buffer
        for member in members
        if isinstance(member, DistributedOptimizer)
        for buffer in member.buffers
    ]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        buffer.param_index_map = _without_padding(buffer)
    try:
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def _without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Returns (start, end, bucket) by parameter, in the same order."""
    paddings = (bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets)
    before = list(accumulate(paddings, initial=0))
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }
