"""FP8 linear layers without Transformer Engine: per-tensor current scaling on any device.

Q4 rounds to e4m3 (activations, weights) and Q5 to e5m2 (output gradients). Each scales the tensor
so that its largest magnitude becomes the format's largest value. A layer y = x W^T computes

    y  = Q4(x) Q4(W)^T      dx = Q5(dy) Q4(W)      dW = Q5(dy)^T Q4(x)

through torch._scaled_mm on a GPU. On a CPU the dequantized tensors are multiplied in fp32: torch's
product there took 300 times as long on a CPU with AMX, and failed where oneDNN was held to AVX2 or
AVX-512 (torch 2.13). Rounding passes gradients straight through. Parameters, their main copies and
everything between the layers keep their precision. Under tensor and context parallelism the largest
magnitude is that of the group, so a layer computes with the same quantized values under every
layout. Cost: a product, plus two passes over each operand; the saved input takes one byte a value.

The classes are Megatron-Core's; only the function in which they multiply is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_dwm.runtime import tensor_context_group
from megatron_dwm.runtime.machine import multiplies_fp8

ACTIVATIONS = torch.float8_e4m3fn
GRADIENTS = torch.float8_e5m2


@dataclass(frozen=True)
class Quantized:
    """A tensor in FP8: it represents values * scale. scale: float32, one value."""

    values: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        """Returns what it represents, in float32."""
        return self.values.float() * self.scale


def quantize(tensor: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Quantized:
    """Returns `tensor` in FP8, scaled to its largest magnitude over `group` (collective).

    group: None for a tensor that no other rank shares.
    """
    largest = tensor.detach().abs().amax().float()
    if group is not None and group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    limit = torch.finfo(dtype).max
    scale = torch.where(largest > 0, largest / limit, 1.0)
    # Rounding the quotient can exceed the format's largest value, which the cast would make nan.
    values = (tensor.detach().float() / scale).clamp(-limit, limit).to(dtype)
    return Quantized(values, scale)


def _product(left_NK: Quantized, right_KM: Quantized, dtype: torch.dtype) -> Tensor:
    """Returns [N, M] in `dtype`. CUDA's kernel requires these memory layouts, too.

    Where it has no kernel for them, the dequantized tensors are multiplied, in float32.
    """
    if not _has_kernel(left_NK.values, right_KM.values):
        return (left_NK.dequantized() @ right_KM.dequantized()).to(dtype)
    return torch._scaled_mm(
        left_NK.values.contiguous(),
        right_KM.values.t().contiguous().t(),
        left_NK.scale,
        right_KM.scale,
        out_dtype=dtype,
    )


def _has_kernel(left_NK: Tensor, right_KM: Tensor) -> bool:
    """True on GPUs from Ada on if K and M are multiples of 16."""
    return multiplies_fp8(left_NK.device) and all(size % 16 == 0 for size in right_KM.shape)


def _transposed(tensor: Quantized) -> Quantized:
    return Quantized(tensor.values.t(), tensor.scale)


class _Linear(torch.autograd.Function):
    """y = x W^T in FP8; the gradient passes straight through both roundings."""

    @staticmethod
    def forward(
        ctx: Any, input_SBD: Tensor, weight_CD: Tensor, group: dist.ProcessGroup, sum_input: bool
    ) -> Tensor:
        scaled_over = tensor_context_group()
        kept = quantize(input_SBD.flatten(0, 1), ACTIVATIONS, scaled_over)
        weight = quantize(weight_CD, ACTIVATIONS, scaled_over)
        ctx.save_for_backward(kept.values, kept.scale, weight.values, weight.scale)
        ctx.group, ctx.sum_input, ctx.weight_dtype = group, sum_input, weight_CD.dtype
        output = _product(kept, _transposed(weight), input_SBD.dtype)
        return output.view(*input_SBD.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, gradient_SBC: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        tensors = ctx.saved_tensors
        kept, weight = Quantized(*tensors[:2]), Quantized(*tensors[2:])
        gradient = quantize(gradient_SBC.flatten(0, 1), GRADIENTS, tensor_context_group())
        input_gradient = _product(gradient, weight, gradient_SBC.dtype)
        if ctx.sum_input:
            dist.all_reduce(input_gradient, group=ctx.group)
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = _product(_transposed(gradient), kept, ctx.weight_dtype)
        return input_gradient.view(*gradient_SBC.shape[:2], -1), weight_gradient, None, None


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron-Core's column-parallel layer with its product in FP8; a bias is not rounded."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **_: Any,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(
                input, tensor_parallel_output_grad=True, group=self.tp_group
            )
        output_SBC = _Linear.apply(input, weight, self.tp_group, allreduce_dgrad)
        return output_SBC if bias is None else output_SBC + bias


class Fp8RowParallelLinear(RowParallelLinear):
    """Megatron-Core's row-parallel layer with its product in FP8."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: None, **_: Any) -> Tensor:
        assert bias is None, "it is added to the sum of the ranks' products"
        return _Linear.apply(input, weight, self.tp_group, False)
