"""Tangents of the kinds of layers, <d_t, f(a_t; Z)> summed over the tokens of each unit.

adapters.py says which module has which. d is the gradient of a module's output, a its input, Z the
slice of z that belongs to its parameter. Pure functions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dwm.model.layers.fp8_emulation import ACTIVATIONS, GRADIENTS, quantize
from megatron_dwm.model.passes.units import Units


def rms_normed(kept_SBD: Tensor, width: int, epsilon: float | None) -> Tensor:
    """Returns x / rms(x) over the last dimension, of `width` values."""
    return F.rms_norm(kept_SBD, (width,), None, epsilon)


def layer_normed(kept_SBD: Tensor, width: int, epsilon: float) -> Tensor:
    """Returns (x - mean(x)) / std(x) over the last dimension, of `width` values."""
    return F.layer_norm(kept_SBD, (width,), None, None, epsilon)


def linear_tangent(gradient_SBC: Tensor, kept_SBD: Tensor, z_CD: Tensor, units: Units) -> Tensor:
    """Returns sum_t <d_t, Z x_t> for each unit, [U], computed as (d Z) * x."""
    product_SBD = gradient_SBC.matmul(z_CD.to(gradient_SBC.dtype)) * kept_SBD
    return units.sum_of_sequence(product_SBD, _at_least_fp32(gradient_SBC))


def norm_tangent(
    gradient_SBD: Tensor, normed_SBD: Tensor, z_D: Tensor, units: Units, *, first: int = 0
) -> Tensor:
    """Returns sum_t <d_t, z * n(x_t)>, [U] by unit; a norm of heads takes [S, B, heads, D].

    first: position of the first token in its row.
    """
    dtype = _at_least_fp32(gradient_SBD)
    product_SBD = gradient_SBD * normed_SBD * z_D.to(dtype)
    return units.sum_of_sequence(product_SBD, dtype, first=first)


def bias_tangent(gradient_SBC: Tensor, z_C: Tensor, units: Units, *, first: int = 0) -> Tensor:
    """Returns sum_t <d_t, z> for each unit, [U]; arguments as in `norm_tangent`."""
    dtype = _at_least_fp32(gradient_SBC)
    return units.sum_of_sequence(gradient_SBC * z_C.to(dtype), dtype, first=first)


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
