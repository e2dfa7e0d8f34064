"""Numbers that go wrong: what is checked before a step changes anything.

The mean loss of the batch and the gradient norm are known to all ranks before the optimizer
moves, so that a step can be left out everywhere at once. Cost: nothing beyond what a step reports.
"""

from __future__ import annotations

import math

from megatron.core.optimizer import ChainedOptimizer

from megatron_dwm.config import RunError

# Weights are fp32 sums of a softmax; a wrong normalisation is far beyond this.
_MEAN_TOLERANCE = 1e-3


class _NotFinite(Exception):
    pass


def step_if_finite(optimizer: ChainedOptimizer) -> float:
    """One optimizer step; returns the gradient norm. If it is not finite nothing was done.

    ChainedOptimizer.step (megatron/core/optimizer/optimizer.py) asks `get_grad_norm` before it
    clips or steps, and does not look at the answer: here it is looked at.
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
    """mean: of a global batch's weights. wrong: fraction of them not finite or negative.

    Raises RunError unless they are finite, non-negative and of mean 1.
    """
    if wrong or not abs(mean - 1.0) <= _MEAN_TOLERANCE:
        raise RunError(
            f"the policy's weights must be finite, non-negative and of mean 1: {wrong:.1%} are "
            f"not finite or negative, the mean is {mean}; go on from the last checkpoint with a "
            "smaller weighting.learning_rate, and if that does not help, report it"
        )
