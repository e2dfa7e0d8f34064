"""Adam's update and its derivative, tensor by tensor (METHOD.md, section 2).

    m = b1*m0 + (1-b1)*g    v = b2*v0 + (1-b2)*g^2    c_k = 1 - b_k^t
    u = (m/c1) / (sqrt(v/c2) + eps)
    J = du/dg = (1-b1)/c1/(sqrt(V)+eps) - M*(1-b2)*g / (c2*sqrt(V)*(sqrt(V)+eps)^2)

with V = v/c2 and M = m/c1. Pure functions; they never write the moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamMoments:
    """Adam's state and constants for one tensor. `step` counts the steps already taken."""

    first: Tensor
    second: Tensor
    step: int
    beta1: float
    beta2: float
    epsilon: float

    def after(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (m, sqrt(V)) after a step with `gradient`; m is not yet bias-corrected.

        The operations and their order are those of torch.optim.AdamW on one tensor.
        """
        first = torch.lerp(self.first, gradient, 1 - self.beta1)
        second = (self.second * self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        return first, second.sqrt_().div_(self.correction2**0.5)

    @property
    def correction1(self) -> float:
        """Bias correction c1 of the next step."""
        return 1 - self.beta1 ** (self.step + 1)

    @property
    def correction2(self) -> float:
        """Bias correction c2 of the next step."""
        return 1 - self.beta2 ** (self.step + 1)


def adam_step(theta: Tensor, gradient: Tensor, moments: AdamMoments, lr: float) -> Tensor:
    """Returns theta - lr * u(g) as a new tensor.

    >>> zero = torch.zeros(2)
    >>> moments = AdamMoments(zero, zero, step=0, beta1=0.9, beta2=0.95, epsilon=1e-8)
    >>> adam_step(torch.ones(2), torch.tensor([0.5, -2.0]), moments, lr=0.1)  # lr times the signs
    tensor([0.9000, 1.1000])
    """
    first, root = moments.after(gradient)
    return theta.addcdiv(first, root.add_(moments.epsilon), value=-lr / moments.correction1)


def adam_jacobian(gradient: Tensor, moments: AdamMoments) -> Tensor:
    """Returns the diagonal of du/dg, shaped like the gradient."""
    first, root = moments.after(gradient)
    outer = root + moments.epsilon
    # If V is 0, so are g and m, and the second term is 0: 0/0 is computed as 0/1.
    safe_root = torch.where(root > 0, root, 1.0)
    factor = (1 - moments.beta2) / (moments.correction1 * moments.correction2)
    second_term = first.mul_(gradient).mul_(factor).div_(safe_root).div_(outer).div_(outer)
    first_term = outer.reciprocal_().mul_((1 - moments.beta1) / moments.correction1)
    return first_term.sub_(second_term)
