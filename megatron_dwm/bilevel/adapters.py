"""How the tangent of every module class is formed: the table that the probe reads.

A module with parameters W, input a and output gradient d contributes <d_t, f(a_t; Z)> for every
token t, with Z the slices of z that belong to W (METHOD.md, section 2). For each class that the
specs can produce the table says how; a class that is not in it has no tangent, and the probe
refuses the model. Classes are named, not imported: Transformer Engine cannot be loaded without a
GPU (tests/signatures resolves the names in the real packages).

    x -> W x                  <d Z, x>                  the product of an input gradient's size
    x -> g * n(x)             <d, z * n(x)>             n(x) = x / rms(x), recomputed
    x -> W (g * n(x))         <d Z, g * n(x)> + <d W, z * n(x)>     bilinear: one product more
    tokens -> W[tokens]       <d, Z[tokens]>
    x -> Q4(W) Q4(x)          <Q5(d) Z, Q4(x)>          emulated FP8: z on the very gradient,
                                                        Q5(d)^T Q4(x), that the layer itself forms

On Transformer Engine's FP8 layers d, x and z are taken as they are, in bf16: the tangent of the
straight-through gradient without the rounding of the weight gradient's product.

Tensor parallel: a split weight gives each rank a partial sum; partial sums meet in the probe's one
reduction. Under sequence parallelism a column-parallel layer gathers its input, a row-parallel one
scatters its output. The input is gathered here, as it is in plain training for the weight gradient
that the probe does not form. The output's gradient is gathered by Megatron-Core's own backward pass
before it reaches the product, so it is taken there, and nothing is added; of a Transformer Engine
layer only the scattered output can be had, and its gradient is gathered once more. A norm is
counted on one rank, or on all where each sees a part: of the sequence, or of the heads (a norm of
queries or keys).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_dwm.model.layers.fp8_emulation import ACTIVATIONS, GRADIENTS, quantise

# (output gradient, kept input) -> [B]
Tangent = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a module stands. group: the tensor-parallel group.

    sees_part: this rank's input is its own part of the sequence or of the heads, and no copy of
    what the other tensor-parallel ranks see.
    """

    sequence_parallel: bool
    tensor_rank: int
    group: dist.ProcessGroup | None
    sees_part: bool

    def counts(self, adapter: Adapter) -> bool:
        """True if this rank's value belongs into the sum over the tensor-parallel ranks."""
        return adapter.splits_weight or self.sees_part or self.tensor_rank == 0

    def whole(self, tensor_SBD: Tensor) -> Tensor:
        """[S / tensor size, B, D] -> [S, B, D] under sequence parallelism, else as it is."""
        if not self.sequence_parallel:
            return tensor_SBD
        assert self.group is not None
        part_SBD = tensor_SBD.contiguous()
        whole_SBD = part_SBD.new_empty(part_SBD.shape[0] * self.group.size(), *part_SBD.shape[1:])
        dist.all_gather_into_tensor(whole_SBD, part_SBD, group=self.group)
        return whole_SBD


@dataclass(frozen=True)
class Adapter:
    """The tangent of one module class.

    form: (module, its keyword arguments, place) -> the function of one forward pass.
    input_name: of the input, where it is not passed by position.
    splits_weight: every tensor-parallel rank holds a part of the parameter. False where each holds
    all of it: whether the ranks then form equal values is for the place to say.
    method: of the module; its arguments and output are probed instead of the module's own.
    """

    form: Callable[[Module, Mapping[str, Any], Place], Tangent]
    input_name: str
    splits_weight: bool = True
    method: str = ""


def linear_tangent(gradient_SBC: Tensor, kept_SBD: Tensor, z_CD: Tensor) -> Tensor:
    """[B]: sum_t <d_t, Z x_t>, as (d Z) * x."""
    product_SBD = gradient_SBC.matmul(z_CD.to(gradient_SBC.dtype)) * kept_SBD
    return product_SBD.sum(dim=(0, 2), dtype=_at_least_fp32(gradient_SBC))


def norm_tangent(gradient_SBD: Tensor, kept_SBD: Tensor, z_D: Tensor, epsilon: float) -> Tensor:
    """[B]: sum_t <d_t, z * n(x_t)>; a norm of heads sees [S, B, heads, D]."""
    normed_SBD = F.rms_norm(kept_SBD, z_D.shape, None, epsilon)
    others = [dim for dim in range(kept_SBD.dim()) if dim != 1]
    return (gradient_SBD * normed_SBD * z_D).sum(dim=others, dtype=_at_least_fp32(gradient_SBD))


def norm_linear_tangent(
    gradient_SBC: Tensor,
    kept_SBD: Tensor,
    gain: tuple[Tensor, Tensor],
    weight: tuple[Tensor, Tensor],
    epsilon: float,
) -> Tensor:
    """[B]: sum_t <d_t, Z (g * n(x_t)) + W (z * n(x_t))>.

    gain: (g, z) [D]; weight: (W, Z) [C, D].
    """
    dtype = gradient_SBC.dtype
    (g_D, z_D), (w_CD, z_CD) = gain, weight
    product_SBD = gradient_SBC.matmul(z_CD.to(dtype)) * g_D.to(dtype)
    product_SBD += gradient_SBC.matmul(w_CD.to(dtype)) * z_D.to(dtype)
    normed_SBD = F.rms_norm(kept_SBD, g_D.shape, None, epsilon)
    return (product_SBD * normed_SBD).sum(dim=(0, 2), dtype=_at_least_fp32(gradient_SBC))


def embedding_tangent(
    gradient_BSD: Tensor, tokens_BS: Tensor, z_VD: Tensor, first: int, last: int
) -> Tensor:
    """[B]: sum_t <d_t, Z[token_t]> over the rows first to last - 1 that this rank holds."""
    here_BS = (tokens_BS >= first) & (tokens_BS < last)
    rows_BSD = F.embedding((tokens_BS - first).where(here_BS, 0), z_VD)
    dtype = _at_least_fp32(gradient_BSD)
    return ((gradient_BSD * rows_BSD).sum(dim=2, dtype=dtype) * here_BS).sum(dim=1)


def quantised_linear_tangent(
    gradient_SBC: Tensor, kept_SBD: Tensor, z_CD: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """[B]: sum_t <Q5(d)_t, Z Q4(x)_t>, with the scales of the layer's own products (collective)."""
    gradient = quantise(gradient_SBC, GRADIENTS, group)
    kept = quantise(kept_SBD, ACTIVATIONS, group)
    product_SBD = gradient.values.float().matmul(z_CD.float()) * kept.values.float()
    return product_SBD.sum(dim=(0, 2)) * (gradient.scale * kept.scale)


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _z(parameter: Parameter) -> Tensor:
    """z's slice of a parameter stands in its gradient buffer."""
    return parameter.main_grad


def _column(module: Module, kwargs: Mapping[str, Any], place: Place) -> Tangent:
    tied = kwargs.get("weight")  # a tied output layer is handed the embedding's
    z = _z(module.weight if tied is None else tied)
    return lambda gradient, kept: linear_tangent(gradient, place.whole(kept), z)


def _row(module: Module, _: Mapping[str, Any], __: Place) -> Tangent:
    z = _z(module.weight)
    return lambda gradient, kept: linear_tangent(gradient, kept, z)


def _te_row(module: Module, _: Mapping[str, Any], place: Place) -> Tangent:
    z = _z(module.weight)
    return lambda gradient, kept: linear_tangent(place.whole(gradient), kept, z)


def _quantised_column(module: Module, _: Mapping[str, Any], place: Place) -> Tangent:
    z = _z(module.weight)
    return lambda gradient, kept: quantised_linear_tangent(
        gradient, place.whole(kept), z, place.group
    )


def _quantised_row(module: Module, _: Mapping[str, Any], place: Place) -> Tangent:
    z = _z(module.weight)
    return lambda gradient, kept: quantised_linear_tangent(gradient, kept, z, place.group)


def _norm_then_column(module: Module, _: Mapping[str, Any], place: Place) -> Tangent:
    assert module.normalization == "RMSNorm" and not module.zero_centered_gamma
    gain = (module.layer_norm_weight.detach(), _z(module.layer_norm_weight))
    weight = (module.weight.detach(), _z(module.weight))
    return lambda gradient, kept: norm_linear_tangent(
        gradient, place.whole(kept), gain, weight, module.eps
    )


def _norm(module: Module, _: Mapping[str, Any], __: Place) -> Tangent:
    z = _z(module.weight)
    return lambda gradient, kept: norm_tangent(gradient, kept, z, module.epsilon)


def _te_norm(module: Module, _: Mapping[str, Any], __: Place) -> Tangent:
    assert not module.zero_centered_gamma
    z = _z(module.weight)
    return lambda gradient, kept: norm_tangent(gradient, kept, z, module.eps)


def _embedding(module: Module, _: Mapping[str, Any], place: Place) -> Tangent:
    first, last, z = module.vocab_start_index, module.vocab_end_index, _z(module.weight)

    def tangent(gradient: Tensor, tokens_BS: Tensor) -> Tensor:
        if module.reduce_scatter_embeddings:  # the output is [S, B, D] then
            gradient = place.whole(gradient).transpose(0, 1)
        return embedding_tangent(gradient, tokens_BS, z, first, last)

    return tangent


# Megatron-Core's product of a linear layer, before its output is reduced or scattered.
_PRODUCT = "_forward_impl"

_MEGATRON = "megatron.core.tensor_parallel.layers."
_MEGATRON_TE = "megatron.core.extensions.transformer_engine."
_OURS = "megatron_dwm.model.layers."

ADAPTERS: Mapping[str, Adapter] = {
    _MEGATRON + "ColumnParallelLinear": Adapter(_column, "input_"),
    _MEGATRON + "RowParallelLinear": Adapter(_row, "input", method=_PRODUCT),
    _MEGATRON + "VocabParallelEmbedding": Adapter(_embedding, "input_"),
    _OURS + "local.RMSNorm": Adapter(_norm, "hidden_SBD", splits_weight=False),
    _OURS + "fp8_emulation.Fp8ColumnParallelLinear": Adapter(_quantised_column, "input_"),
    _OURS + "fp8_emulation.Fp8RowParallelLinear": Adapter(_quantised_row, "input", method=_PRODUCT),
    _MEGATRON_TE + "TEColumnParallelLinear": Adapter(_column, "x"),
    _MEGATRON_TE + "TERowParallelLinear": Adapter(_te_row, "x"),
    _MEGATRON_TE + "TELayerNormColumnParallelLinear": Adapter(_norm_then_column, "x"),
    # What TENorm makes for RMSNorm.
    "transformer_engine.pytorch.module.rmsnorm.RMSNorm": Adapter(
        _te_norm, "input", splits_weight=False
    ),
}
"""Class name -> adapter. Exactly these classes: a subclass may compute something else."""

WITHOUT_PARAMETERS = (_MEGATRON_TE + "TEDotProductAttention",)
"""Transformer Engine's classes in the specs that have no parameters, and so no tangent."""


# Megatron-Core's names of the norms that see this rank's heads (transformer/attention.py).
_NORMS_OF_HEADS = ("q_layernorm", "k_layernorm")


def place_of(
    name: str, *, sequence_parallel: bool, tensor_rank: int, group: dist.ProcessGroup | None
) -> Place:
    """The place of the module with this dotted name in the model."""
    of_heads = name.rsplit(".", 1)[-1] in _NORMS_OF_HEADS
    return Place(
        sequence_parallel=sequence_parallel,
        tensor_rank=tensor_rank,
        group=group,
        sees_part=sequence_parallel or of_heads,
    )


def adapter_for(module: Module, adapters: Mapping[str, Adapter] = ADAPTERS) -> Adapter | None:
    """The adapter of a module; None for one without parameters of its own.

    Raises NotImplementedError for parameters of a class that the table does not name: a parameter
    that was left out would make every alignment wrong.
    """
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in adapters:
        return adapters[name]
    if any(True for _ in module.parameters(recurse=False)):
        raise NotImplementedError(f"the tangent probe has no adapter for {name}")
    return None
