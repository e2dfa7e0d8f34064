"""The table of module classes that the tangent probe reads: how each class forms its tangent.

A module with parameters W, input a and output gradient d contributes <d_t, f(a_t; Z)> for every
token t, with Z the slices of z that belong to W (METHOD.md, section 2). The table has every class
that the specs can produce; the probe refuses a model with a class that is not in it. Classes are
named, not imported, because Transformer Engine cannot be imported without a GPU (tests/signatures
resolves the names in the real packages).

    x -> W x                  <d Z, x>                  one product of an input gradient's size
    x -> g * n(x)             <d, z * n(x)>             n(x) = x / rms(x), recomputed
    x -> W (g * n(x))         <d Z, g * n(x)> + <d W, z * n(x)>     bilinear: a second product
    tokens -> W[tokens]       <d, Z[tokens]>
    x -> Q4(W) Q4(x)          <Q5(d) Z, Q4(x)>          emulated FP8: the inner product of z with
                                                        Q5(d)^T Q4(x), which the layer itself forms

For Transformer Engine's FP8 layers d, x and z stay in bf16: this is the tangent of the
straight-through gradient without the rounding of the weight gradient's product.

Tensor parallel: with a split weight each rank forms a partial sum, and the probe's one reduction
adds them. Under sequence parallelism a column-parallel layer gathers its input and a row-parallel
layer scatters its output. The column-parallel input is gathered here, as plain training gathers it
for the weight gradient that the probe does not form. Megatron-Core's own backward pass gathers the
output gradient of a row-parallel layer before the product, so the hook is on that product and
gathers nothing. In a Transformer Engine layer the hook only sees the scattered output, so its
gradient is gathered a second time. A norm is counted on one rank, or on all ranks if each sees a
part of the sequence or of the heads (a norm of queries or keys).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from megatron_dwm.bilevel.slots import SliceOfZ
from megatron_dwm.model.layers.fp8_emulation import ACTIVATIONS, GRADIENTS, quantize
from megatron_dwm.model.passes.units import Units

# (output gradient, kept input, units of the micro-batch) -> [U]
Tangent = Callable[[Tensor, Tensor, Units], Tensor]


@dataclass(frozen=True)
class TensorParallelPosition:
    """A module's part in tensor parallelism. group: the tensor-parallel group.

    scaled_over: the ranks that share the scales of emulated FP8; None for one process.
    sees_part: this rank's input is its own part of the sequence or of the heads, not a copy of
    the input of the other tensor-parallel ranks.
    """

    sequence_parallel: bool
    tensor_rank: int
    group: dist.ProcessGroup | None
    sees_part: bool
    scaled_over: dist.ProcessGroup | None = None

    def counts(self, adapter: Adapter) -> bool:
        """True if this rank's value belongs in the sum over the tensor-parallel ranks."""
        return adapter.splits_weight or self.sees_part or self.tensor_rank == 0

    def whole(self, tensor_SBD: Tensor) -> Tensor:
        """Returns the whole sequence, [S, B, D]; gathers it under sequence parallelism."""
        if not self.sequence_parallel:
            return tensor_SBD
        assert self.group is not None
        part_SBD = tensor_SBD.contiguous()
        whole_SBD = part_SBD.new_empty(part_SBD.shape[0] * self.group.size(), *part_SBD.shape[1:])
        dist.all_gather_into_tensor(whole_SBD, part_SBD, group=self.group)
        return whole_SBD

    def first_of(self, part_SBD: Tensor) -> int:
        """Returns the position in the row of the first token of a norm's input.

        A norm of heads, whose input is [S, B, heads, D], sees the whole sequence.
        """
        has_part = self.sequence_parallel and part_SBD.dim() == 3
        return self.tensor_rank * len(part_SBD) if has_part else 0


@dataclass(frozen=True)
class Adapter:
    """The tangent of one module class.

    form: (module, its keyword arguments, position, slices of z) -> the tangent of one forward pass.
    input_name: keyword of the input, for calls that do not pass it by position.
    splits_weight: True if every tensor-parallel rank holds a part of the parameter. If False, each
    holds all of it, and the position tells whether the ranks form equal values.
    method: a method of the module, whose arguments and output are probed instead of the module's.
    """

    form: Callable[[Module, Mapping[str, Any], TensorParallelPosition, SliceOfZ], Tangent]
    input_name: str
    splits_weight: bool = True
    method: str = ""


def linear_tangent(gradient_SBC: Tensor, kept_SBD: Tensor, z_CD: Tensor, units: Units) -> Tensor:
    """Returns sum_t <d_t, Z x_t> for each unit, [U], computed as (d Z) * x."""
    product_SBD = gradient_SBC.matmul(z_CD.to(gradient_SBC.dtype)) * kept_SBD
    return units.sum_of_sequence(product_SBD, _at_least_fp32(gradient_SBC))


def norm_tangent(
    gradient_SBD: Tensor,
    kept_SBD: Tensor,
    z_D: Tensor,
    epsilon: float,
    units: Units,
    *,
    first: int = 0,
) -> Tensor:
    """Returns sum_t <d_t, z * n(x_t)>, [U] by unit; a norm of heads takes [S, B, heads, D].

    first: position of the first token in its row.
    """
    normed_SBD = F.rms_norm(kept_SBD, z_D.shape, None, epsilon)
    dtype = _at_least_fp32(gradient_SBD)
    product_SBD = gradient_SBD * normed_SBD * z_D.to(dtype)
    return units.sum_of_sequence(product_SBD, dtype, first=first)


def norm_linear_tangent(
    gradient_SBC: Tensor,
    kept_SBD: Tensor,
    gain: tuple[Tensor, Tensor],
    weight: tuple[Tensor, Tensor],
    epsilon: float,
    units: Units,
) -> Tensor:
    """Returns sum_t <d_t, Z (g * n(x_t)) + W (z * n(x_t))> for each unit, [U].

    gain: (g, z) [D]; weight: (W, Z) [C, D].
    """
    dtype = gradient_SBC.dtype
    (g_D, z_D), (w_CD, z_CD) = gain, weight
    product_SBD = gradient_SBC.matmul(z_CD.to(dtype)) * g_D.to(dtype)
    product_SBD += gradient_SBC.matmul(w_CD.to(dtype)) * z_D.to(dtype)
    normed_SBD = F.rms_norm(kept_SBD, g_D.shape, None, epsilon)
    return units.sum_of_sequence(product_SBD * normed_SBD, _at_least_fp32(gradient_SBC))


def embedding_tangent(
    gradient_BSD: Tensor, tokens_BS: Tensor, z_VD: Tensor, first: int, last: int, units: Units
) -> Tensor:
    """Returns sum_t <d_t, Z[token_t]> for each unit, [U], over this rank's rows of Z.

    first, last: this rank holds the rows first to last - 1 of the vocabulary.
    """
    here_BS = (tokens_BS >= first) & (tokens_BS < last)
    dtype = _at_least_fp32(gradient_BSD)
    rows_BSD = F.embedding((tokens_BS - first).where(here_BS, 0), z_VD).to(dtype)
    return units.sum_of_rows((gradient_BSD * rows_BSD).sum(dim=2, dtype=dtype) * here_BS)


def quantized_linear_tangent(
    gradient_SBC: Tensor,
    kept_SBD: Tensor,
    z_CD: Tensor,
    group: dist.ProcessGroup | None,
    units: Units,
) -> Tensor:
    """Returns sum_t <Q5(d)_t, Z Q4(x)_t>, [U] by unit, with the layer's scales (collective)."""
    gradient = quantize(gradient_SBC, GRADIENTS, group)
    kept = quantize(kept_SBD, ACTIVATIONS, group)
    product_SBD = gradient.values.float().matmul(z_CD.float()) * kept.values.float()
    sums_U = units.sum_of_sequence(product_SBD, product_SBD.dtype)
    return sums_U * (gradient.scale * kept.scale)


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _column(
    module: Any, kwargs: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    tied = kwargs.get("weight")  # a tied output layer is handed the embedding's
    z = z_of(module.weight if tied is None else tied)
    return lambda gradient, kept, units: linear_tangent(gradient, position.whole(kept), z, units)


def _row(module: Any, _: Mapping[str, Any], __: TensorParallelPosition, z_of: SliceOfZ) -> Tangent:
    z = z_of(module.weight)
    return lambda gradient, kept, units: linear_tangent(gradient, kept, z, units)


def _te_row(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    z = z_of(module.weight)
    return lambda gradient, kept, units: linear_tangent(position.whole(gradient), kept, z, units)


def _quantized_column(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    z = z_of(module.weight)
    return lambda gradient, kept, units: quantized_linear_tangent(
        gradient, position.whole(kept), z, position.scaled_over, units
    )


def _quantized_row(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    z = z_of(module.weight)
    return lambda gradient, kept, units: quantized_linear_tangent(
        gradient, kept, z, position.scaled_over, units
    )


def _norm_then_column(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    assert module.normalization == "RMSNorm" and not module.zero_centered_gamma
    gain = (module.layer_norm_weight.detach(), z_of(module.layer_norm_weight))
    weight = (module.weight.detach(), z_of(module.weight))
    return lambda gradient, kept, units: norm_linear_tangent(
        gradient, position.whole(kept), gain, weight, module.eps, units
    )


def _norm(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    z = z_of(module.weight)
    return lambda gradient, kept, units: norm_tangent(
        gradient, kept, z, module.epsilon, units, first=position.first_of(kept)
    )


def _te_norm(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    assert not module.zero_centered_gamma
    z = z_of(module.weight)
    return lambda gradient, kept, units: norm_tangent(
        gradient, kept, z, module.eps, units, first=position.first_of(kept)
    )


def _embedding(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    first, last, z = module.vocab_start_index, module.vocab_end_index, z_of(module.weight)

    def tangent(gradient: Tensor, tokens_BS: Tensor, units: Units) -> Tensor:
        if module.reduce_scatter_embeddings:  # the output is [S, B, D] then
            gradient = position.whole(gradient).transpose(0, 1)
        return embedding_tangent(gradient, tokens_BS, z, first, last, units)

    return tangent


# Megatron-Core's product of a linear layer, before its output is reduced or scattered.
_PRODUCT = "_forward_impl"

MEGATRON = "megatron.core.tensor_parallel.layers."
MEGATRON_TE = "megatron.core.extensions.transformer_engine."
OURS = "megatron_dwm.model.layers."

ADAPTERS: Mapping[str, Adapter] = {
    MEGATRON + "ColumnParallelLinear": Adapter(_column, "input_"),
    MEGATRON + "RowParallelLinear": Adapter(_row, "input", method=_PRODUCT),
    MEGATRON + "VocabParallelEmbedding": Adapter(_embedding, "input_"),
    OURS + "local.RMSNorm": Adapter(_norm, "hidden_SBD", splits_weight=False),
    OURS + "fp8_emulation.Fp8ColumnParallelLinear": Adapter(_quantized_column, "input_"),
    OURS + "fp8_emulation.Fp8RowParallelLinear": Adapter(_quantized_row, "input", method=_PRODUCT),
    MEGATRON_TE + "TEColumnParallelLinear": Adapter(_column, "x"),
    MEGATRON_TE + "TERowParallelLinear": Adapter(_te_row, "x"),
    MEGATRON_TE + "TELayerNormColumnParallelLinear": Adapter(_norm_then_column, "x"),
    # What TENorm makes for RMSNorm.
    "transformer_engine.pytorch.module.rmsnorm.RMSNorm": Adapter(
        _te_norm, "input", splits_weight=False
    ),
}
"""class name -> adapter; it is for that class only, since a subclass may compute otherwise"""

WITHOUT_PARAMETERS = (MEGATRON_TE + "TEDotProductAttention",)
"""Transformer Engine's classes in the specs without parameters, which have no tangent"""


# Megatron-Core's names of the norms over this rank's heads (transformer/attention.py).
_NORMS_OF_HEADS = ("q_layernorm", "k_layernorm")


def position_of(
    name: str,
    *,
    sequence_parallel: bool,
    tensor_rank: int,
    group: dist.ProcessGroup | None,
    scaled_over: dist.ProcessGroup | None = None,
) -> TensorParallelPosition:
    """Returns the position of the module with this dotted name in the model."""
    of_heads = name.rsplit(".", 1)[-1] in _NORMS_OF_HEADS
    return TensorParallelPosition(
        sequence_parallel=sequence_parallel,
        tensor_rank=tensor_rank,
        group=group,
        sees_part=sequence_parallel or of_heads,
        scaled_over=scaled_over,
    )


def class_name(module: Module) -> str:
    """Returns the dotted name of the module's class, as tables of classes have it."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def adapter_for(module: Module, adapters: Mapping[str, Adapter] = ADAPTERS) -> Adapter | None:
    """Returns the adapter of a module; None for a module without parameters of its own.

    Raises NotImplementedError for a class with parameters that is not in the table: without its
    tangent every alignment would be wrong.
    """
    name = class_name(module)
    if name in adapters:
        return adapters[name]
    if any(True for _ in module.parameters(recurse=False)):
        raise NotImplementedError(f"the tangent probe has no adapter for {name}")
    return None
