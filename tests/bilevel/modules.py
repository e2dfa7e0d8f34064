"""Plain torch modules that compute what probed layers do, each in a case with z and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_dwm.bilevel.adapters import FUSED_LAYER_NORM, MEGATRON, TORCH
from megatron_dwm.bilevel.position import position_of
from megatron_dwm.model import Units

SEQUENCE, BATCH, WIDTH, OUT = 5, 3, 8, 6
EPSILON = 1e-3
ALONE = position_of("", sequence_parallel=False, tensor_rank=0, group=None)
TE = "megatron.core.extensions.transformer_engine."
FUSED = TE + "TELayerNormColumnParallelLinear"
TE_NORM = "transformer_engine.pytorch.module.rmsnorm.RMSNorm"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Fused(Module):
    """What Transformer Engine's LayerNormLinear computes with RMSNorm, with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.normalization, self.zero_centered_gamma, self.eps = "RMSNorm", False, EPSILON
        self.layer_norm_weight = Parameter(draw(WIDTH))
        self.weight = Parameter(draw(OUT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [S, B, OUT] from [S, B, WIDTH]."""
        rms = (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        return (self.layer_norm_weight * x / rms) @ self.weight.t()


class Norm(Module):
    """What Transformer Engine's RMSNorm computes, with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.zero_centered_gamma, self.eps = False, EPSILON
        self.weight = Parameter(draw(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the input normalized, [S, B, WIDTH]."""
        return self.weight * x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()


class Linear(Module):
    """What Transformer Engine's Linear computes, with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(draw(OUT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [S, B, OUT] from [S, B, WIDTH]."""
        return x @ self.weight.t()


class WithBias(Linear):
    """A linear layer of Megatron-Core's or Transformer Engine's with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = Parameter(draw(OUT))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [S, B, OUT] from [S, B, WIDTH]."""
        return super().forward(x) + self.bias


class FusedWithBias(Fused):
    """Transformer Engine's LayerNormLinear with a bias, as for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = Parameter(draw(OUT))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [S, B, OUT] from [S, B, WIDTH]."""
        return super().forward(x) + self.bias


def torchs_layer_norm() -> Module:
    """A LayerNorm of torch's, away from scales of 1 and biases of 0."""
    norm = torch.nn.LayerNorm(WIDTH, eps=EPSILON, dtype=torch.float64)
    norm.weight.data, norm.bias.data = draw(WIDTH), draw(WIDTH)
    return norm


def torchs_rms_norm() -> Module:
    """An RMSNorm of torch's, away from scales of 1."""
    norm = torch.nn.RMSNorm(WIDTH, eps=EPSILON, dtype=torch.float64)
    norm.weight.data = draw(WIDTH)
    return norm


COLUMN, ROW = (MEGATRON + f"{name}ParallelLinear" for name in ("Column", "Row"))
LAYER_NORM, RMS_NORM = (TORCH + f"normalization.{name}Norm" for name in ("Layer", "RMS"))
WITH_BIAS: list[tuple[str, Callable[[], Module]]] = [
    (COLUMN, WithBias),
    (ROW, WithBias),
    (TE + "TEColumnParallelLinear", WithBias),
    (FUSED, FusedWithBias),
    (LAYER_NORM, torchs_layer_norm),
    (FUSED_LAYER_NORM, torchs_layer_norm),
    (RMS_NORM, torchs_rms_norm),
]
"""modules with a bias, and torch's norms"""


@dataclass(frozen=True)
class Case:
    """A module with z in its gradient buffers, an input and an output gradient."""

    module: Module
    x_SBD: Tensor
    gradient_SBC: Tensor

    def expected(self) -> Tensor:
        """Returns <z, gradient of sample b's own loss>, [B], from one autograd pass per sample."""
        found = []
        for b in range(BATCH):
            loss = (self.module(self.x_SBD)[:, b] * self.gradient_SBC[:, b]).sum()
            parameters = list(self.module.parameters())
            gradients = torch.autograd.grad(loss, parameters)
            pairs = zip(gradients, parameters, strict=True)
            found.append(sum((g * p.main_grad).sum() for g, p in pairs))
        return torch.stack(found)


ROWS = Units(count=BATCH)


def case_of(kind: Callable[[], Module]) -> Case:
    torch.manual_seed(3)
    module = kind()
    for parameter in module.parameters():
        parameter.main_grad = draw(*parameter.shape)
    x_SBD = draw(SEQUENCE, BATCH, WIDTH)
    return Case(module, x_SBD, draw(*module(x_SBD).shape))


# Two rows of several units, one of which has padding, and a row that is one unit.
NUMBERS_BS = torch.tensor([[0, 1, 1, 2, 2], [3, 3, 3, 3, 3], [4, 5, 5, -1, -1]])
DOCUMENTS = Units(count=6, numbers_BS=NUMBERS_BS)
