"""How each module class adds its units' gradients to their sketches (sketch.py).

The table has the classes of adapters.py, and the same hooks bring the output gradient d and the
input x; adapters.py says who sees which part of them under tensor and sequence parallelism.

    x -> W x              sum_t d_t x_t^T
    y -> y + b            sum_t d_t
    x -> g * n(x)         sum_t d_t * n(x_t)
    x -> W (g * n(x))     sum_t d_t (g * n(x_t))^T  and  sum_t (W^T d_t) * n(x_t)
    tokens -> W[tokens]   d_t to the row of its token
    x -> Q4(W) Q4(x)      sum_t Q5(d_t) Q4(x_t)^T
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module

from megatron_dwm.bilevel.adapters import (
    FUSED_LAYER_NORM,
    MEGATRON,
    MEGATRON_TE,
    OURS,
    TORCH,
    Normalize,
    bias_of,
    epsilon_of,
)
from megatron_dwm.bilevel.position import TensorParallelPosition
from megatron_dwm.bilevel.sketch import UnitSketches
from megatron_dwm.bilevel.tangents import layer_normed, rms_normed
from megatron_dwm.model.layers.fp8_emulation import ACTIVATIONS, GRADIENTS, Quantized, quantize
from megatron_dwm.model.passes.units import Units

# (sketches, output gradient, kept input, units of the micro-batch, the row of the first of them)
AddGradients = Callable[[UnitSketches, Tensor, Tensor, Units, int], None]
# (module, keyword arguments of its call, position) -> what its backward pass calls
Form = Callable[[Module, Mapping[str, Any], TensorParallelPosition], AddGradients]


def _column(module: Any, kwargs: Mapping[str, Any], at: TensorParallelPosition) -> AddGradients:
    tied = kwargs.get("weight")  # a tied output layer is handed the embedding's
    weight = module.weight if tied is None else tied
    return _with_bias(
        lambda sketches, gradient, kept, units, first: sketches.add_linear(
            weight, gradient, at.whole(kept), units, first
        ),
        module,
    )


def _with_bias(add: AddGradients, module: Any) -> AddGradients:
    """Returns what adds a linear layer's gradients, with that of its bias if it has one."""
    bias = bias_of(module)
    if bias is None:
        return add

    def both(
        sketches: UnitSketches, gradient: Tensor, kept: Tensor, units: Units, first: int
    ) -> None:
        add(sketches, gradient, kept, units, first)
        sketches.add_vector(bias, gradient, units, first)

    return both


def _row(module: Any, _: Mapping[str, Any], at: TensorParallelPosition) -> AddGradients:
    def add(
        sketches: UnitSketches, gradient: Tensor, kept: Tensor, units: Units, first: int
    ) -> None:
        sketches.add_linear(module.weight, gradient, kept, units, first)

    # Every rank has the whole bias and the whole output gradient.
    return _with_bias(add, module) if at.tensor_rank == 0 else add


def _te_row(module: Any, _: Mapping[str, Any], at: TensorParallelPosition) -> AddGradients:
    return lambda sketches, gradient, kept, units, first: sketches.add_linear(
        module.weight, at.whole(gradient), kept, units, first
    )


def _quantized_column(
    module: Any, _: Mapping[str, Any], at: TensorParallelPosition
) -> AddGradients:
    return _with_bias(
        lambda sketches, gradient, kept, units, first: sketches.add_linear(
            module.weight, *_quantized(gradient, at.whole(kept), at), units, first
        ),
        module,
    )


def _quantized_row(module: Any, _: Mapping[str, Any], at: TensorParallelPosition) -> AddGradients:
    return lambda sketches, gradient, kept, units, first: sketches.add_linear(
        module.weight, *_quantized(gradient, kept, at), units, first
    )


def _quantized(gradient: Tensor, kept: Tensor, at: TensorParallelPosition) -> tuple[Tensor, Tensor]:
    """Returns both as the layer's own weight gradient has them (collective)."""
    rounded = (
        quantize(tensor, dtype, at.scaled_over)
        for tensor, dtype in ((gradient, GRADIENTS), (kept, ACTIVATIONS))
    )
    first, second = (_values(each) for each in rounded)
    return first, second


def _values(quantized: Quantized) -> Tensor:
    return quantized.values.float() * quantized.scale


def _norm_then_column(
    module: Any, _: Mapping[str, Any], at: TensorParallelPosition
) -> AddGradients:
    def add(
        sketches: UnitSketches, gradient: Tensor, kept: Tensor, units: Units, first: int
    ) -> None:
        gain_D, weight_CD = module.layer_norm_weight, module.weight
        normed_SBD = rms_normed(at.whole(kept), len(gain_D), module.eps)
        sketches.add_linear(weight_CD, gradient, gain_D.detach() * normed_SBD, units, first)
        products_SBD = gradient.matmul(weight_CD.detach().to(gradient.dtype)) * normed_SBD
        sketches.add_vector(gain_D, products_SBD, units, first)

    return _with_bias(add, module)


def _norm_by(normalize: Normalize) -> Form:
    def form(module: Any, _: Mapping[str, Any], at: TensorParallelPosition) -> AddGradients:
        gain_D, bias = module.weight, bias_of(module)

        def add(
            sketches: UnitSketches, gradient: Tensor, kept: Tensor, units: Units, first: int
        ) -> None:
            position = at.first_of(kept)
            products_SBD = gradient * normalize(kept, len(gain_D), epsilon_of(module))
            sketches.add_vector(gain_D, products_SBD, units, first, position=position)
            if bias is not None:
                sketches.add_vector(bias, gradient, units, first, position=position)

        return add

    return form


def _embedding(module: Any, _: Mapping[str, Any], at: TensorParallelPosition) -> AddGradients:
    start, stop = module.vocab_start_index, module.vocab_end_index

    def add(
        sketches: UnitSketches, gradient: Tensor, tokens_BS: Tensor, units: Units, first: int
    ) -> None:
        scattered = module.reduce_scatter_embeddings  # the output is [S, B, D] then
        gradient_SBD = at.whole(gradient) if scattered else gradient.transpose(0, 1)
        tokens_SB = tokens_BS.t()
        here_SB = (tokens_SB >= start) & (tokens_SB < stop)
        rows_SB = (tokens_SB - start).where(here_SB, -1)
        sketches.add_rows(module.weight, gradient_SBD, rows_SB, units, first)

    return add


def _positions(module: Any, _: Mapping[str, Any], __: TensorParallelPosition) -> AddGradients:
    return lambda sketches, gradient_BSD, positions_BS, units, first: sketches.add_rows(
        module.weight, gradient_BSD.transpose(0, 1), positions_BS.t(), units, first
    )


FORMS: Mapping[str, Form] = {
    MEGATRON + "ColumnParallelLinear": _column,
    MEGATRON + "RowParallelLinear": _row,
    MEGATRON + "VocabParallelEmbedding": _embedding,
    OURS + "local.RMSNorm": _norm_by(rms_normed),
    OURS + "fp8_emulation.Fp8ColumnParallelLinear": _quantized_column,
    OURS + "fp8_emulation.Fp8RowParallelLinear": _quantized_row,
    TORCH + "normalization.RMSNorm": _norm_by(rms_normed),
    TORCH + "normalization.LayerNorm": _norm_by(layer_normed),
    FUSED_LAYER_NORM: _norm_by(layer_normed),
    TORCH + "sparse.Embedding": _positions,
    MEGATRON_TE + "TEColumnParallelLinear": _column,
    MEGATRON_TE + "TERowParallelLinear": _te_row,
    MEGATRON_TE + "TELayerNormColumnParallelLinear": _norm_then_column,
    "transformer_engine.pytorch.module.rmsnorm.RMSNorm": _norm_by(rms_normed),
}
"""class name -> form; it has the same classes as adapters.ADAPTERS"""
