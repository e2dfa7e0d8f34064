"""A check of the weights before a step changes anything; it costs nothing, as they are reported."""

from __future__ import annotations

from megatron_dwm.config import RunError, UserError

# Weights come from a softmax in fp32; a wrong normalization is far larger than this.
_MEAN_TOLERANCE = 1e-3
_PACKAGE = __name__.partition(".")[0]


def require_sound_weights(mean: float, wrong: float, method: object) -> None:
    """Raise UserError (of a method outside the package) or RunError unless weights are sound.

    They have to be finite, non-negative and of mean 1. mean: of the global batch's weights. wrong:
    fraction that is not finite or negative.
    """
    if not wrong and abs(mean - 1.0) <= _MEAN_TOLERANCE:
        return
    found = (
        f"the policy's weights must be finite, non-negative and of mean 1: {wrong:.1%} are not "
        f"finite or negative, the mean is {mean}; "
    )
    if not type(method).__module__.startswith(f"{_PACKAGE}."):
        name = f"{type(method).__module__}:{type(method).__qualname__}"
        raise UserError(f"{found}correct {name}.weights, for example divide by the mean")
    raise RunError(
        f"{found}continue from the last checkpoint (--run.resume true), and report it if it "
        "happens again"
    )
