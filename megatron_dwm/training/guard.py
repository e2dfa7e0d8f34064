"""Checks of losses, gradients and weights before a step changes anything.

All ranks know the mean loss of the batch and the gradient norm before the optimizer runs, so all
skip a step together. Cost: none, since a step reports these numbers anyway.
"""

from __future__ import annotations

import math

from megatron.core.optimizer import ChainedOptimizer

from megatron_dwm.config import RunError

# Weights come from a softmax in fp32; a wrong normalization is far larger than this.
_MEAN_TOLERANCE = 1e-3


class _NotFinite(Exception):
    pass


def step_if_finite(optimizer: ChainedOptimizer) -> float:
    """Take one optimizer step and return the gradient norm; if it is not finite, change nothing.

    ChainedOptimizer.step (megatron/core/optimizer/optimizer.py) calls `get_grad_norm` before it
    clips or steps, but does not check the result. This function does.
    """
    upstream = optimizer.get_grad_norm
    found = float("nan")

    def checked() -> float:
        nonlocal found
        norm = upstream()
        found = float(norm or 0.0)
        if not math.isfinite(found):
            raise _NotFinite
        return norm

    optimizer.get_grad_norm = checked
    try:
        optimizer.step()
    except _NotFinite:
        pass
    finally:
        del optimizer.get_grad_norm
    return found


def require_sound_weights(mean: float, wrong: float) -> None:
    """Raise RunError unless weights are finite, non-negative and of mean 1.

    mean: mean of the global batch's weights. wrong: fraction that is not finite or negative.
    """
    if wrong or not abs(mean - 1.0) <= _MEAN_TOLERANCE:
        raise RunError(
            f"the policy's weights must be finite, non-negative and of mean 1: {wrong:.1%} are "
            f"not finite or negative, the mean is {mean}; continue from the last checkpoint "
            "(--run.resume true), and report it if it happens again"
        )
