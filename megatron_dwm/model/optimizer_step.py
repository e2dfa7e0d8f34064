"""An optimizer step that changes nothing if the gradient norm is not finite.

All ranks know the norm before the optimizer runs, so all leave a step out together.
"""

from __future__ import annotations

import math

from megatron.core.optimizer import ChainedOptimizer

from megatron_dwm.model.parameter_gather import expect_gather


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
    expect_gather(optimizer)
    return found
