"""The table of module classes that the tangent probe reads: how each class forms its tangent.

A module with parameters W, input a and output gradient d contributes <d_t, f(a_t; Z)> for every
token t, with Z the slices of z that belong to W (METHOD.md, section 2). The table has every class
that our specs and Megatron-Core's own local spec can produce; the probe refuses a model with a
class that is not in it, or with a parameter that the class's adapter does not read. Classes are
named, not imported, because Transformer Engine cannot be imported without CUDA's libraries
(tests/signatures resolves the names in the real packages).

    x -> W x                  <d Z, x>                  one product of an input gradient's size
    y -> y + b                <d, z>                    the bias of a linear layer or of a norm
    x -> g * n(x)             <d, z * n(x)>             n(x) = x / rms(x) or (x - mean(x)) / std(x),
                                                        recomputed
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
part of the sequence or of the heads (a norm of queries or keys: each holds the whole scale and
normalizes its own heads, and Megatron-Core sums the scale's gradient over the ranks). One rank
counts the bias of a row-parallel layer and learned positions, whose whole sequence all ranks see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from megatron_dwm.bilevel.position import TensorParallelPosition
from megatron_dwm.bilevel.slots import SliceOfZ
from megatron_dwm.bilevel.tangents import (
    bias_tangent,
    embedding_tangent,
    layer_normed,
    linear_tangent,
    norm_linear_tangent,
    norm_tangent,
    quantized_linear_tangent,
    rms_normed,
)
from megatron_dwm.model.passes.units import Units

# (output gradient, kept input, units of the micro-batch) -> [U]
Tangent = Callable[[Tensor, Tensor, Units], Tensor]


# (module, its keyword arguments, position, slices of z) -> the tangent of one forward pass
Form = Callable[[Module, Mapping[str, Any], TensorParallelPosition, SliceOfZ], Tangent]


@dataclass(frozen=True)
class Adapter:
    """The tangent of one module class.

    form: makes the tangent of one forward pass.
    input_name: keyword of the input, for calls that do not pass it by position.
    splits_weight: True if every tensor-parallel rank holds a part of the parameter. If False, each
    holds all of it, and the position tells whether the ranks form equal values.
    sees_whole: True if each rank sees the whole sequence also under sequence parallelism.
    method: a method of the module, whose arguments and output are probed instead of the module's.
    parameters: names of those that it reads.
    """

    form: Form
    input_name: str
    splits_weight: bool = True
    sees_whole: bool = False
    method: str = ""
    parameters: tuple[str, ...] = ("weight", "bias")

    def counts_at(self, position: TensorParallelPosition) -> bool:
        """True if that rank's value belongs in the sum over the tensor-parallel ranks."""
        has_own_part = self.splits_weight or (position.sees_part and not self.sees_whole)
        return has_own_part or position.tensor_rank == 0


def bias_of(module: Any) -> Parameter | None:
    """Returns the module's bias; Transformer Engine has an empty tensor for none."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Parameter) else None


def epsilon_of(module: Any) -> float:
    """Returns the epsilon of a norm of ours, of torch's or of Transformer Engine's."""
    return module.epsilon if hasattr(module, "epsilon") else module.eps


def _with_bias(tangent: Tangent, module: Any, z_of: SliceOfZ) -> Tangent:
    """Returns the tangent of a linear layer with that of its bias, if it has one."""
    bias = bias_of(module)
    if bias is None:
        return tangent
    z_C = z_of(bias)
    return lambda gradient, kept, units: (
        tangent(gradient, kept, units) + bias_tangent(gradient, z_C, units)
    )


def _column(
    module: Any, kwargs: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    tied = kwargs.get("weight")  # a tied output layer is handed the embedding's
    z = z_of(module.weight if tied is None else tied)
    return _with_bias(
        lambda gradient, kept, units: linear_tangent(gradient, position.whole(kept), z, units),
        module,
        z_of,
    )


def _row(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    z = z_of(module.weight)

    def tangent(gradient: Tensor, kept: Tensor, units: Units) -> Tensor:
        return linear_tangent(gradient, kept, z, units)

    # Every rank has the whole bias and the whole output gradient.
    return _with_bias(tangent, module, z_of) if position.tensor_rank == 0 else tangent


def _te_row(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    z = z_of(module.weight)
    return lambda gradient, kept, units: linear_tangent(position.whole(gradient), kept, z, units)


def _quantized_column(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    z = z_of(module.weight)
    return _with_bias(
        lambda gradient, kept, units: quantized_linear_tangent(
            gradient, position.whole(kept), z, position.scaled_over, units
        ),
        module,
        z_of,
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
    return _with_bias(
        lambda gradient, kept, units: norm_linear_tangent(
            gradient, position.whole(kept), gain, weight, module.eps, units
        ),
        module,
        z_of,
    )


# (input, its width, epsilon) -> n(x)
Normalize = Callable[[Tensor, int, Any], Tensor]


def _norm_by(normalize: Normalize) -> Form:
    def form(
        module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
    ) -> Tangent:
        z_D, bias = z_of(module.weight), bias_of(module)
        z_bias = None if bias is None else z_of(bias)

        def tangent(gradient: Tensor, kept: Tensor, units: Units) -> Tensor:
            first = position.first_of(kept)
            normed_SBD = normalize(kept, len(z_D), epsilon_of(module))
            found_U = norm_tangent(gradient, normed_SBD, z_D, units, first=first)
            if z_bias is not None:
                found_U = found_U + bias_tangent(gradient, z_bias, units, first=first)
            return found_U

        return tangent

    return form


def _embedding(
    module: Any, _: Mapping[str, Any], position: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    first, last, z = module.vocab_start_index, module.vocab_end_index, z_of(module.weight)

    def tangent(gradient: Tensor, tokens_BS: Tensor, units: Units) -> Tensor:
        if module.reduce_scatter_embeddings:  # the output is [S, B, D] then
            gradient = position.whole(gradient).transpose(0, 1)
        return embedding_tangent(gradient, tokens_BS, z, first, last, units)

    return tangent


def _positions(
    module: Any, _: Mapping[str, Any], __: TensorParallelPosition, z_of: SliceOfZ
) -> Tangent:
    assert module.padding_idx is None and module.max_norm is None
    assert not module.scale_grad_by_freq, "a row's gradient would depend on all tokens"
    z = z_of(module.weight)
    return lambda gradient, positions_BS, units: embedding_tangent(
        gradient, positions_BS, z, 0, len(z), units
    )


# Megatron-Core's product of a linear layer, before its output is reduced or scattered.
_PRODUCT = "_forward_impl"

MEGATRON = "megatron.core.tensor_parallel.layers."
MEGATRON_TE = "megatron.core.extensions.transformer_engine."
OURS = "megatron_dwm.model.layers."
TORCH = "torch.nn.modules."
FUSED_LAYER_NORM = "megatron.core.fusions.fused_layer_norm.FusedLayerNorm"

_LAYER_NORM = Adapter(_norm_by(layer_normed), "input", splits_weight=False)

ADAPTERS: Mapping[str, Adapter] = {
    MEGATRON + "ColumnParallelLinear": Adapter(_column, "input_"),
    MEGATRON + "RowParallelLinear": Adapter(_row, "input", method=_PRODUCT),
    MEGATRON + "VocabParallelEmbedding": Adapter(_embedding, "input_"),
    OURS + "local.RMSNorm": Adapter(_norm_by(rms_normed), "hidden_SBD", splits_weight=False),
    OURS + "fp8_emulation.Fp8ColumnParallelLinear": Adapter(_quantized_column, "input_"),
    OURS + "fp8_emulation.Fp8RowParallelLinear": Adapter(
        _quantized_row, "input", method=_PRODUCT, parameters=("weight",)
    ),
    # What WrappedTorchNorm makes, and with apex its own class; learned positions.
    TORCH + "normalization.RMSNorm": Adapter(_norm_by(rms_normed), "x", splits_weight=False),
    TORCH + "normalization.LayerNorm": _LAYER_NORM,
    FUSED_LAYER_NORM: _LAYER_NORM,
    TORCH + "sparse.Embedding": Adapter(_positions, "input", splits_weight=False, sees_whole=True),
    MEGATRON_TE + "TEColumnParallelLinear": Adapter(_column, "x"),
    MEGATRON_TE + "TERowParallelLinear": Adapter(_te_row, "x", parameters=("weight",)),
    MEGATRON_TE + "TELayerNormColumnParallelLinear": Adapter(
        _norm_then_column, "x", parameters=("layer_norm_weight", "weight", "bias")
    ),
    # What TENorm makes for RMSNorm.
    "transformer_engine.pytorch.module.rmsnorm.RMSNorm": Adapter(
        _norm_by(rms_normed), "input", splits_weight=False
    ),
}
"""class name -> adapter; it is for that class only, since a subclass may compute otherwise"""

WITHOUT_PARAMETERS = (MEGATRON_TE + "TEDotProductAttention",)
"""Transformer Engine's classes in the specs without parameters, which have no tangent"""


def class_name(module: Module) -> str:
    """Returns the dotted name of the module's class, as tables of classes have it."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def adapter_for(module: Module, adapters: Mapping[str, Adapter] = ADAPTERS) -> Adapter | None:
    """Returns the adapter of a module; None for a module without parameters of its own.

    Raises NotImplementedError for a class with parameters that is not in the table, and for a
    parameter that its adapter does not read: without its tangent every alignment would be wrong.
    """
    name, adapter = class_name(module), adapters.get(class_name(module))
    own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    if adapter is None and own:
        raise NotImplementedError(
            f"the tangent probe has no adapter for {name}; CONTRIBUTING.md says how to add a layer"
        )
    if adapter is None or not (own or adapter.form is _column):  # a tied output layer has none
        return None
    for parameter in own:
        if parameter not in adapter.parameters:
            raise NotImplementedError(
                f"the tangent probe's adapter for {name} does not read its parameter {parameter}; "
                "CONTRIBUTING.md says how to add a layer"
            )
    return adapter
