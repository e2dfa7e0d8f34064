"""A step of a torch optimizer, taken and reversed, and z through it (METHOD.md, section 2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.bilevel.adam import AdamMoments, adam_jacobian, adam_step
from megatron_dwm.library.optimizers import moments_of, relative_rate, wide

# torch.nn.utils.clip_grad_norm_ divides by the norm plus this.
_CLIP_EPSILON = 1e-6


@dataclass(frozen=True)
class _Stepped:
    """A parameter that the step changes. moments: None for plain descent.

    rate: the group's learning rate as a part of the largest.
    """

    parameter: Tensor
    gradient: Tensor
    group: Mapping[str, Any]
    rate: float
    moments: AdamMoments | None


@dataclass(frozen=True)
class TorchStep:
    """theta' = theta - lr * (u(c * g) + weight_decay * theta), with g in `Tensor.grad`.

    norm: |g|. factor: c, 1 if clipping is not active.
    """

    stepped: list[_Stepped]
    norm: float
    factor: float

    @staticmethod
    @torch.no_grad()
    def along_gradients(optimizer: torch.optim.Optimizer, clip_grad: float) -> TorchStep:
        """Prepare the step along the gradients as they are; parameters keep their values."""
        stepped = [
            _Stepped(p, p.grad.detach().clone(), group, rate, moments_of(optimizer, p, group))
            for group in optimizer.param_groups
            for rate in [relative_rate(optimizer, group)]
            for p in group["params"]
            if p.grad is not None
        ]
        squares = [each.gradient.double().square().sum() for each in stepped]
        norm = float(torch.stack(squares).sum().sqrt())
        factor = min(1.0, clip_grad / (norm + _CLIP_EPSILON)) if clip_grad else 1.0
        return TorchStep(stepped, norm, factor)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Have theta' in the parameters during the context."""
        kept = [each.parameter.detach().clone() for each in self.stepped]
        with torch.no_grad():
            for each in self.stepped:
                each.parameter.copy_(self._after(each))
        try:
            yield
        finally:
            with torch.no_grad():
                for each, theta in zip(self.stepped, kept, strict=True):
                    each.parameter.copy_(theta)

    @torch.no_grad()
    def direction(self) -> dict[int, Tensor]:
        """Returns z by the parameter's id, from the validation gradient in `Tensor.grad`."""
        z = {
            id(each.parameter): self._pulled_back(each)
            for each in self.stepped
            if each.parameter.grad is not None
        }
        if self.factor < 1.0:
            self._pull_back_clipping(z)
        return z

    def _after(self, each: _Stepped) -> Tensor:
        lr, decay = each.group["lr"], each.group.get("weight_decay", 0.0)
        theta, gradient = wide(each.parameter) * (1.0 - lr * decay), self.factor * each.gradient
        if each.moments is None:
            return theta - lr * gradient
        return adam_step(theta, wide(gradient), each.moments, lr)

    def _pulled_back(self, each: _Stepped) -> Tensor:
        assert each.parameter.grad is not None
        cotangent = wide(each.parameter.grad.detach()) * each.rate
        if each.moments is None:
            return cotangent
        return cotangent * adam_jacobian(self.factor * wide(each.gradient), each.moments)

    def _pull_back_clipping(self, z: dict[int, Tensor]) -> None:
        """z <- c * (z - g <z, g> / (|g| (|g| + epsilon))), in place."""
        mine = [each for each in self.stepped if id(each.parameter) in z]
        inner = sum(float((z[id(e.parameter)].double() * e.gradient).sum()) for e in mine)
        share = inner / (self.norm * (self.norm + _CLIP_EPSILON))
        for each in self.stepped:
            moved = z.setdefault(id(each.parameter), torch.zeros_like(wide(each.gradient)))
            moved.sub_(each.gradient, alpha=share).mul_(self.factor)
