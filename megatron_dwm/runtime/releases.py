"""What differs between the releases of Megatron-Core that this code runs on: 0.16.1 to 0.19.

Each function says what changed, and in which release. Everything else in the package uses what is
the same in all of them.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


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


def redirect_streams(cuda: Any) -> None:
    """Give Megatron-Core the CPU's stream for CUDA's on a machine without a GPU.

    0.19 asks for it in every reduction of gradients (distributed/param_and_grad_buffer.py,
    `start_grad_sync`), and waits for events that only CUDA graphs record. 0.18 and before do not.

    cuda: the module torch.cuda.
    """
    cuda.current_stream = lambda *_: torch.cpu.current_stream()
