"""<z, grad l_i> by a central difference: (l_i(theta + h z) - l_i(theta - h z)) / 2h.

A cross-check that needs forward passes only. In fp32 its error is about 2e-3. Below fp32 the
perturbation is smaller than the spacing of the parameters, so lower precision is refused.
Parameters are restored from a copy, never by adding and subtracting.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.bilevel.slots import slice_of_z
from megatron_dwm.model import LLM, MicroBatch, forward_only
from megatron_dwm.runtime.profiling import phase

# h is chosen so that the largest change of a sample's loss, relative to the mean loss, is this.
# Rounding (6e-8 of a loss) then gives an error of 1e-3. At a change of 1e-3 the truncation error
# along Adam's z is 1e-1; at 1e-5 the rounding error is. |z| cannot set h, because Adam's Jacobian
# is huge for parameters that no sample has reached.
TARGET_CHANGE = 1e-4
FIRST_RELATIVE_STEP = 1e-3
_ATTEMPTS = 12


@phase("finite difference")
@torch.no_grad()
def finite_difference(llm: LLM, micro_batches: list[MicroBatch]) -> Tensor:
    """Returns <z, grad l_i> of every local sample, float32 [n], with z in the gradient buffers.

    Raises ValueError for a model below fp32, or in FP8.
    """
    parameters = llm.parameters()
    if llm.is_quantized or any(parameter.dtype != torch.float32 for parameter in parameters):
        raise ValueError(
            "bilevel.estimator finite_difference: parameters below fp32 cannot hold the "
            "perturbation, and FP8 rounds it away; use tangent_probe or model.precision fp32"
        )
    kept = [parameter.clone() for parameter in parameters]
    directions = [slice_of_z(parameter) for parameter in parameters]
    h = FIRST_RELATIVE_STEP * _norm(llm, kept) / max(_norm(llm, directions), 1e-30)
    for attempt in range(_ATTEMPTS):
        plus_n, minus_n = (
            _losses_at(llm, micro_batches, kept, directions, signed) for signed in (h, -h)
        )
        factor = TARGET_CHANGE / max(_largest_change(plus_n, minus_n), 1e-30)
        if 0.5 < factor < 2.0 or attempt == _ATTEMPTS - 1:
            break
        h *= min(max(factor, 1e-3), 1e3)
    for parameter, theta in zip(parameters, kept, strict=True):
        parameter.copy_(theta)
    return ((plus_n - minus_n) / (2 * h)).float()


def _losses_at(
    llm: LLM,
    micro_batches: list[MicroBatch],
    kept: list[Tensor],
    directions: list[Tensor],
    step: float,
) -> Tensor:
    """Returns l_i(theta + step * z), float64 [n]."""
    for parameter, theta, z in zip(llm.parameters(), kept, directions, strict=True):
        parameter.copy_(torch.add(theta, z, alpha=step))
    return forward_only(llm, micro_batches).unit_losses_n.double()


def _largest_change(plus_n: Tensor, minus_n: Tensor) -> float:
    """Returns the largest change of any sample in the world, relative to the mean loss.

    Every rank has to choose the same h, hence the maximum over the world.
    """
    change = ((plus_n - minus_n).abs().max() / plus_n.mean().abs()).clone()
    dist.all_reduce(change, op=dist.ReduceOp.MAX)
    return float(change)


def _norm(llm: LLM, tensors: list[Tensor]) -> float:
    """Returns the norm over the inner group, the same on all its ranks.

    Replicated parameters count more than once. This does no harm: the norm only sets a step size.
    """
    total = torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()
    dist.all_reduce(total, group=llm.runtime.inner_group)
    return float(total.sqrt())
