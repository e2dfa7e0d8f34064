"""The gather of parameters that overlaps with a forward pass (parallel.overlap_param_gather).

With the sharded optimizer a replica steps its shard of the parameters, and the other shards have to
come from the other replicas. With the overlap they come in the next forward pass: a hook before
each module waits for the module's parameters and starts the gather of the next ones
(Megatron-Core's distributed/distributed_data_parallel.py). Between the step and that pass a replica
has old values of all shards but its own. So whatever reads parameters outside a forward pass calls
`gather_now` first, and whatever changes them calls `expect_gather` after. Without the
overlap the step itself gathers, and all of this has no effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_dwm.model.wrapped import WrappedModel
from megatron_dwm.runtime import releases


def gather_now(llm: WrappedModel) -> None:
    """Have the parameters of all shards on every replica now (collective)."""
    for chunk in _overlapping(llm.chunks):
        chunk.start_param_sync(force_sync=True)


def expect_gather(optimizer: ChainedOptimizer) -> None:
    """Let the next forward pass gather the parameters, whatever has been gathered since the last.

    Megatron-Core notes a gather until the next gradient is reduced; a virtual step gathers in
    between, and would hide the step that follows it.
    """
    for member in optimizer.chained_optimizers:
        if isinstance(member, DistributedOptimizer):
            for chunk in _overlapping(member.model_chunks):
                releases.expect_param_gather(chunk)


@contextmanager
def without_gathers(llm: WrappedModel) -> Iterator[None]:
    """Have no hooks during the context: they refuse frozen parameters.

    The parameters have to be whole before.
    """
    chunks = list(_overlapping(llm.chunks))
    for chunk in chunks:
        chunk.disable_forward_pre_hook(param_sync=False)
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.enable_forward_pre_hook()


def _overlapping(chunks: Iterable[Any]) -> Iterator[Any]:
    """Yields the wrappers that have hooks; a frozen model has none."""
    return (chunk for chunk in chunks if getattr(chunk, "use_forward_hook", False))
