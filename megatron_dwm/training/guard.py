"""A check of the weights before a step changes anything; it costs nothing, as they are reported."""

from __future__ import annotations

from megatron_dwm.config import RunError

# Weights come from a softmax in fp32; a wrong normalization is far larger than this.
_MEAN_TOLERANCE = 1e-3


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
