"""State of this process's random number generators, for checkpoints.

It has tensors and plain numbers only, so that a checkpoint can be read without unpickling objects.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def random_state() -> dict[str, Any]:
    """Returns the state of Python's, numpy's, torch's and Megatron-Core's generators."""
    legacy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": dict(get_cuda_rng_tracker().get_states()),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all generators to the state that `random_state` returned.

    Generators of another kind of device, a CPU's or a GPU's, keep their own state.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() != (state["cuda"] is not None):
        return
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(dict(state["megatron"]))
