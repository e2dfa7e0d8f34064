"""The optimizer's update of one tensor and its pullback, as the virtual step uses them.

    step      theta' = theta - lr * u(g), decoupled weight decay first, as torch.optim.AdamW
    pullback  J^T v with J = du/dg at g

A rule is a pair of functions of a slot. An optimizer whose Jacobian is not diagonal needs one more
class and one more line in UPDATE_RULES. Rules read the moments and never write them.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_dwm.bilevel.adam import adam_jacobian, adam_step
from megatron_dwm.bilevel.problem import InnerOptimizer
from megatron_dwm.bilevel.slots import Slot


class UpdateRule(Protocol):
    """The step of one tensor along a clipped gradient of the same shape."""

    def step(self, slot: Slot, gradient: Tensor) -> Tensor:
        """Returns theta' as a new tensor."""
        ...

    def pullback(self, slot: Slot, gradient: Tensor, cotangent: Tensor, /) -> Tensor:
        """Returns J^T cotangent at `gradient`; may overwrite `cotangent` and return it."""
        ...


class AdamW:
    """The step that training would take, with the current moments (METHOD.md, section 2)."""

    def step(self, slot: Slot, gradient: Tensor) -> Tensor:
        """Returns theta' as a new tensor."""
        return adam_step(_decayed(slot), gradient, slot.moments(), slot.group["lr"])

    def pullback(self, slot: Slot, gradient: Tensor, cotangent: Tensor) -> Tensor:
        """Returns the elementwise product with du/dg, in place."""
        return cotangent.mul_(adam_jacobian(gradient, slot.moments()))


class GradientDescent:
    """Plain descent: u(g) = g."""

    def step(self, slot: Slot, gradient: Tensor) -> Tensor:
        """Returns theta' as a new tensor."""
        return _decayed(slot).sub_(gradient, alpha=slot.group["lr"])

    def pullback(self, _: Slot, __: Tensor, cotangent: Tensor) -> Tensor:
        """Returns the cotangent: J is 1."""
        return cotangent


UPDATE_RULES: dict[InnerOptimizer, UpdateRule] = {"adam": AdamW(), "sgd": GradientDescent()}


def _decayed(slot: Slot) -> Tensor:
    return slot.main * (1.0 - slot.group["lr"] * slot.group["weight_decay"])
