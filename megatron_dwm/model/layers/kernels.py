"""torch's attention for fewer heads of keys than of queries.

On a GPU its kernels that never form the S x S matrix take grouped heads in half precision and
without a bias alone. Otherwise the heads of keys and values are repeated here: the memory-efficient
kernel then takes them. Cost: copies of keys and values, heads / groups times as large.

On a CPU attention is computed in fp32: its backward pass in bf16 took two to five times as long
(torch 2.13, heads of 32 and 16 numbers; equally long for heads of 64).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def grouped_attention(
    query_BHSd: Tensor, key_BgSd: Tensor, value_BgSd: Tensor, **options: Any
) -> Tensor:
    """Returns [B, H, S, d]. options: those of torch's `scaled_dot_product_attention`.

    g divides H: query head h reads the keys of group h // (H / g). A mask that is not of bools has
    `attention_dtype`.
    """
    if _is_slow(query_BHSd):
        return _in_fp32(query_BHSd, key_BgSd, value_BgSd, options)
    heads, groups = query_BHSd.shape[1], key_BgSd.shape[1]
    if heads != groups and _needs_all_heads(query_BHSd, options):
        key_BgSd, value_BgSd = repeat_heads(key_BgSd, value_BgSd, heads // groups)
    return F.scaled_dot_product_attention(
        query_BHSd, key_BgSd, value_BgSd, enable_gqa=heads != key_BgSd.shape[1], **options
    )


def attention_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the precision in which queries of `dtype` attend there; a mask must be in it."""
    return torch.float32 if device.type == "cpu" and dtype in _HALF else dtype


def _is_slow(query: Tensor) -> bool:
    """True on a CPU if the operands are in half precision, or would be cast to it."""
    in_half = query.dtype in _HALF
    return query.device.type == "cpu" and (in_half or torch.is_autocast_enabled("cpu"))


def _in_fp32(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        found = grouped_attention(query.float(), key.float(), value.float(), **options)
    return found.to(value.dtype)


def repeat_heads(key_BgSd: Tensor, value_BgSd: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Returns keys and values with a head for each query head, [B, g * times, S, d]."""
    return key_BgSd.repeat_interleave(times, dim=1), value_BgSd.repeat_interleave(times, dim=1)


def _needs_all_heads(query: Tensor, options: dict[str, Any]) -> bool:
    return query.is_cuda and (query.dtype == torch.float32 or options.get("attn_mask") is not None)
