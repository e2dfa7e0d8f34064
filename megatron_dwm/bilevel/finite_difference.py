"""<z, grad l_i> by a central difference: (l_i(theta + h z) - l_i(theta - h z)) / 2h.

Forward passes only; a cross-check. In fp32 it is right to 1e-3 or so; below fp32 the perturbation
falls under the parameters' own spacing, so lower precision is refused. Parameters come back from a
copy, never by adding and subtracting.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.model import LLM, MicroBatch, forward_only

# h |z| relative to |theta|. The truncation error falls with its square, the rounding error of the
# losses (6e-8 of their size) grows with its inverse.
RELATIVE_STEP = 1e-3


@torch.no_grad()
def finite_difference(llm: LLM, micro_batches: list[MicroBatch]) -> Tensor:
    """float32 [n]: <z, grad l_i> of every local sample, with z in the gradient buffers.

    Raises ValueError for a model below fp32.
    """
    parameters = llm.parameters()
    if any(parameter.dtype != torch.float32 for parameter in parameters):
        raise ValueError(
            "bilevel.estimator finite_difference: parameters below fp32 cannot hold the "
            "perturbation; use tangent_probe or model.precision fp32"
        )
    kept = [parameter.clone() for parameter in parameters]
    directions = [parameter.main_grad for parameter in parameters]
    h = RELATIVE_STEP * _norm(llm, kept) / _norm(llm, directions)
    losses_2n = []
    for signed in (h, -h):
        for parameter, theta, z in zip(parameters, kept, directions, strict=True):
            parameter.copy_(torch.add(theta, z, alpha=signed))
        losses_2n.append(forward_only(llm, micro_batches).sample_losses_n.double())
    for parameter, theta in zip(parameters, kept, strict=True):
        parameter.copy_(theta)
    return ((losses_2n[0] - losses_2n[1]) / (2 * h)).float()


def _norm(llm: LLM, tensors: list[Tensor]) -> float:
    """Norm over the inner group. Replicated parameters count more than once, which is no matter:
    it sets the size of a step, and every rank has to take the same.
    """
    total = torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()
    dist.all_reduce(total, group=llm.runtime.inner_group)
    return float(total.sqrt())
