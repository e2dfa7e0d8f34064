"""Attention with repeated heads of keys and values against torch's own grouped heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_dwm.model.layers import kernels


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_heads_are_the_grouped_ones(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    """Outputs and gradients; a GPU takes this path in fp32 and with a bias."""
    generator = torch.Generator().manual_seed(4)
    sizes = ((2, 6, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    inputs = [torch.randn(*size, generator=generator, requires_grad=True) for size in sizes]
    bias = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf)
    options = {"attn_mask": bias} if masked else {"is_causal": True}
    expected = F.scaled_dot_product_attention(*inputs, enable_gqa=True, **options)
    gradient = torch.randn(expected.shape, generator=generator)
    of_grouped = torch.autograd.grad(expected, inputs, gradient)
    monkeypatch.setattr(kernels, "_needs_all_heads", lambda *_: True)
    found = kernels.grouped_attention(*inputs, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, gradient), of_grouped, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_on_a_cpu_is_fp32_rounded(masked: bool) -> None:
    """Outputs and gradients, to the bit; torch's own bf16 kernel differs in the last digits."""
    generator = torch.Generator().manual_seed(5)
    sizes = ((2, 6, 40, 8), (2, 2, 40, 8), (2, 2, 40, 8))
    inputs = [torch.randn(*size, generator=generator).bfloat16() for size in sizes]
    bias = torch.zeros(40, 40).masked_fill(torch.ones(40, 40).triu(1) > 0, -torch.inf)
    options = {"attn_mask": bias} if masked else {"is_causal": True}
    in_fp32 = {"attn_mask": bias} if masked else {"is_causal": True}
    gradient = torch.randn(sizes[0], generator=generator).bfloat16()
    wide = [each.float().requires_grad_() for each in inputs]
    expected = F.scaled_dot_product_attention(*wide, enable_gqa=True, **in_fp32)
    of_wide = torch.autograd.grad(expected, wide, gradient.float())
    narrow = [each.requires_grad_() for each in inputs]
    found = kernels.grouped_attention(*narrow, **options)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, narrow, gradient), of_wide, strict=True):
        torch.testing.assert_close(ours, theirs.bfloat16(), rtol=0, atol=0)
