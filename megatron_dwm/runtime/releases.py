"""What differs between the releases that this code runs on: Megatron-Core 0.16.1 to 0.19, torch
2.11 to 2.15.

Each function says what changed, and in which release. Everything else in the package uses what is
the same in all of them.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.package_info import __version__
from torch.distributed.checkpoint.metadata import TensorProperties


def version() -> str:
    """Returns the number of the installed release, such as 0.16.1.

    0.19 names its commit after it, and some builds do.
    """
    return __version__.partition("+")[0]


def has_hybrid_model() -> bool:
    """True if the release has HybridModel, which replaces GPTModel.

    0.18 named MambaModel so (models/mamba became models/hybrid) and gave its stack layer numbers
    that count over pipeline stages. 0.19 deprecates GPTModel: its constructor logs a warning on
    rank 0 (models/gpt/gpt_model.py), below the level that bring_up.py sets.
    """
    return importlib.util.find_spec("megatron.core.models.hybrid") is not None


def plan_save(
    strategy: TorchDistSaveShardedStrategy, state: ShardedStateDict, directory: Path
) -> None:
    """Make the strategy's plan of a save (collective).

    0.17 added `async_strategy`, whose default needs the package nvidia-resiliency-ext; "mcore" is
    what 0.16 does.
    """
    takes = inspect.signature(strategy.async_save).parameters
    options = {"async_strategy": "mcore"} if "async_strategy" in takes else {}
    strategy.async_save(state, directory, **options)


@contextmanager
def index_for_every_torch() -> Iterator[None]:
    """Make an index that is written during the context readable for every release of torch.

    torch 2.15 writes a tensor's strides after its other properties
    (torch/distributed/checkpoint/metadata.py, `TensorProperties.__getstate__`). Releases that do
    not know them cannot read such an index; 2.15 reads one without them, and loading does not use
    them.
    """
    known_to_all = 5
    saved: Any = TensorProperties
    before = saved.__getstate__
    saved.__getstate__ = lambda properties: before(properties)[:known_to_all]
    try:
        yield
    finally:
        saved.__getstate__ = before


def redirect_streams(cuda: Any) -> None:
    """Give Megatron-Core the CPU's stream for CUDA's on a machine without a GPU.

    0.19 asks for it in every reduction of gradients (distributed/param_and_grad_buffer.py,
    `start_grad_sync`), and waits for events that only CUDA graphs record. 0.18 and before do not.

    cuda: the module torch.cuda.
    """
    cuda.current_stream = lambda *_: torch.cpu.current_stream()


def forget_scaling_by_a_tensor(clip_grads: Any) -> None:
    """Let Megatron-Core clip by a number, without Transformer Engine's kernel for a tensor.

    0.16 does not know the kernel.

    clip_grads: the module megatron.core.optimizer.clip_grads.
    """
    if hasattr(clip_grads, "multi_tensor_scale_tensor_impl"):
        clip_grads.multi_tensor_scale_tensor_impl = None


def expect_param_gather(chunk: DistributedDataParallel) -> None:
    """Let the next forward pass of a wrapped model gather its parameters.

    0.19 has a method for it; before, the same flag has to be set here.
    """
    reset = getattr(chunk, "reset_param_sync_dispatch_state", None)
    if reset is not None:
        reset()
        return
    for group in chunk.bucket_groups:
        assert group.param_gather_handle is None, "no gather is under way between two passes"
        group.param_gather_dispatched = False
