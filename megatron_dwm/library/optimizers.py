"""What torch's optimizers say about the next step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.bilevel.adam import AdamMoments

_EXPECTED = "expected torch.optim.AdamW, Adam without weight decay, or SGD without momentum"


def require_known(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for an optimizer whose step has another Jacobian."""
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD):
            fits = not (group["momentum"] or group["weight_decay"])
        elif isinstance(optimizer, torch.optim.Adam):  # AdamW is a subclass
            decoupled = isinstance(optimizer, torch.optim.AdamW)
            fits = not group["amsgrad"] and (decoupled or not group["weight_decay"])
        else:
            fits = False
        if not fits or group.get("maximize"):
            raise ValueError(f"optimizer: {_EXPECTED}, got {kind} with {_options(group)}")


def moments_of(
    optimizer: torch.optim.Optimizer, parameter: Tensor, group: Mapping[str, Any]
) -> AdamMoments | None:
    """Returns Adam's moments of a parameter, zero before its first step; None for SGD."""
    if isinstance(optimizer, torch.optim.SGD):
        return None
    state = optimizer.state.get(parameter, {})
    zeros = torch.zeros_like(wide(parameter))
    beta1, beta2 = group["betas"]
    return AdamMoments(
        first=wide(state.get("exp_avg", zeros)),
        second=wide(state.get("exp_avg_sq", zeros)),
        step=int(state.get("step", 0)),
        beta1=float(beta1),
        beta2=float(beta2),
        epsilon=group["eps"],
    )


def relative_rate(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """Returns the group's learning rate as a part of the largest group's, or 1 if all are 0."""
    largest = max(float(each["lr"]) for each in optimizer.param_groups)
    return float(group["lr"]) / largest if largest else 1.0


def wide(tensor: Tensor) -> Tensor:
    """Returns the tensor in float32, or as it is if it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _options(group: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in group.items() if name != "params")
