"""Attention inside documents against a mask in double precision, and what it may cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_dwm.config import ModelConfig, ParallelConfig
from megatron_dwm.model import resolve_shape
from megatron_dwm.model.layers.local import ScaledDotProductAttention, packed_pieces
from megatron_dwm.model.layers.pieces import RATIO, Pieces, attend, pieces_of
from megatron_dwm.model.layers.transformer_engine import packed_sequences
from megatron_dwm.model.llm import transformer_config

WIDTH = 16
# Lengths of the pieces of every row.
BATCHES = {
    "one row, one document": [[48]],
    "a document a row": [[40], [40], [40]],
    "two documents a row": [[13, 27], [1, 39], [20, 20]],
    "single tokens": [[1] * 30, [1] * 30],
    "hundreds": [[3, 1, 2, 5, 4] * 40, [7, 1] * 75],
    "unlike rows": [[600], [1] * 600, [2, 300, 298], [599, 1]],
    "longer than a block of the kernel": [[900, 124], [40, 984]],
}
HEADS = {"as many groups": (4, 4), "two heads a group": (4, 2), "one group": (3, 1)}


def borders_of(lengths: list[list[int]]) -> Tensor:
    """The number of each token's piece, [B, S]."""
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return torch.stack(rows)


def random_lengths(total: int, mean: int, seed: int) -> list[int]:
    """Lengths of about exponential distribution, as those of documents on the web."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        drawn = -mean * math.log(float(torch.rand(1, generator=generator)))
        lengths.append(min(1 + int(drawn), total - sum(lengths)))
    return lengths


def inputs(lengths: list[list[int]], heads: int, groups: int, seed: int = 1) -> list[Tensor]:
    """Query, key, value, [S, B, heads, d]."""
    generator = torch.Generator().manual_seed(seed)
    size = (sum(lengths[0]), len(lengths))
    return [
        torch.randn(*size, number, WIDTH, generator=generator).requires_grad_()
        for number in (heads, groups, groups)
    ]


def masked_attention(parts: list[Tensor], borders_BS: Tensor) -> Tensor:
    """Attention of double-precision parts with the mask written out, [S, B, heads, d]."""
    query, key, value = (part.permute(1, 2, 0, 3) for part in parts)
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    seen = (borders_BS[:, None, :, None] == borders_BS[:, None, None, :]).tril()
    scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH)
    mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
    return mixed.permute(2, 0, 1, 3)


def with_gradients(out: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of the parts under an arbitrary gradient of the output."""
    arbitrary = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out)
    return [out.detach(), *torch.autograd.grad(out, parts, arbitrary)]


def core_attention() -> ScaledDotProductAttention:
    """The layer, as Megatron-Core builds it."""
    model = ModelConfig(hidden_size=64, num_layers=1, num_attention_heads=4)
    config = transformer_config(resolve_shape(model, 64), model, ParallelConfig())
    return ScaledDotProductAttention(config, AttnMaskType.causal, "self", layer_number=1)


def through_core(parts: list[Tensor], pieces: Pieces | None) -> Tensor:
    """The layer's output, called as Megatron-Core calls it."""
    packed = None if pieces is None else packed_pieces(pieces)
    keywords = {"attn_mask_type": AttnMaskType.causal, "attention_bias": None}
    return core_attention()(*parts, None, packed_seq_params=packed, **keywords)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_output_and_gradients_are_those_of_a_mask(
    lengths: list[list[int]], heads: tuple[int, int]
) -> None:
    parts, borders_BS = inputs(lengths, *heads), borders_of(lengths)
    out = through_core(parts, pieces_of(borders_BS))
    assert out.shape == (*borders_BS.t().shape, heads[0] * WIDTH)
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = with_gradients(masked_attention(exact, borders_BS).flatten(2), exact)
    for found, right in zip(with_gradients(out, parts), expected, strict=True):
        # fp32 keeps 6e-8 of a value; sums of up to a thousand. Inputs are near 1, also where a
        # gradient is 0: a token alone does not depend on its query.
        assert (found - right).abs().max() < 3e-6 * right.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_order_of_the_tokens_does_not_matter(lengths: list[list[int]]) -> None:
    parts, pieces = inputs(lengths, 4, 2), pieces_of(borders_of(lengths))
    sequence_first = attend(*parts, pieces.sequence_first)
    batch_first = attend(*(part.transpose(0, 1) for part in parts), pieces.batch_first)
    assert torch.equal(sequence_first, batch_first.transpose(0, 1))


def test_bf16_stays_bf16() -> None:
    lengths = BATCHES["two documents a row"]
    parts, borders_BS = inputs(lengths, 4, 2), borders_of(lengths)
    rounded = [part.detach().bfloat16().requires_grad_() for part in parts]
    found = with_gradients(through_core(rounded, pieces_of(borders_BS)), rounded)
    exact = [part.detach().double().requires_grad_() for part in rounded]
    expected = with_gradients(masked_attention(exact, borders_BS).flatten(2), exact)
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - right).abs().max() < 0.03 * right.abs().max()


def test_rows_of_one_piece_are_plain_attention_to_the_bit() -> None:
    lengths = BATCHES["a document a row"]
    parts, pieces = inputs(lengths, 4, 2), pieces_of(borders_of(lengths))
    query, key, value = (part.permute(1, 2, 0, 3) for part in parts)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = with_gradients(plain.permute(2, 0, 1, 3).reshape(40, 3, -1), parts)
    for given in (None, pieces):
        found = with_gradients(through_core(parts, given), parts)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_neighbors_do_not_change_a_document_by_a_bit() -> None:
    lengths = [[5, 40, 19], [33, 31], [64]]
    borders_BS = borders_of(lengths)
    mine_SB = (borders_BS == 1).t()  # the second document of the first two rows
    pieces, parts = pieces_of(borders_BS), inputs(lengths, 4, 2)
    otherwise = [
        torch.where(mine_SB[..., None, None], part, other).detach().requires_grad_()
        for part, other in zip(parts, inputs(lengths, 4, 2, seed=2), strict=True)
    ]
    runs = [
        with_gradients(attend(*given, pieces.sequence_first), given) for given in (parts, otherwise)
    ]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one[mine_SB], other[mine_SB])
        assert not torch.equal(one[~mine_SB], other[~mine_SB])


def test_values_that_are_not_numbers_stay_in_their_document() -> None:
    lengths = [[5, 40, 19], [33, 31]]
    borders_BS = borders_of(lengths)
    parts = inputs(lengths, 4, 4)
    with torch.no_grad():
        for part in parts:
            part[:5, 0] = float("nan")
    for tensor in with_gradients(attend(*parts, pieces_of(borders_BS).sequence_first), parts):
        assert tensor[:5, 0].isnan().all() and not tensor[5:, 0].isnan().any()
        assert not tensor[:, 1].isnan().any()


def test_second_derivative() -> None:
    """The unrolled hypergradient differentiates the backward pass, on torch's plain kernel."""
    lengths = [[2, 3], [4, 1]]
    parts = [part.detach().double()[..., :2].requires_grad_() for part in inputs(lengths, 2, 1)]
    buckets = pieces_of(borders_of(lengths)).sequence_first
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda *given: attend(*given, buckets), parts)


@pytest.mark.parametrize("mean", [3, 40, 400])
@pytest.mark.parametrize("seed", range(3))
def test_buckets_cost_what_the_docstring_says(mean: int, seed: int) -> None:
    size = 1024
    lengths = [random_lengths(size, mean, 10 * seed + row) for row in range(8)]
    pieces = pieces_of(borders_of(lengths))
    buckets = pieces.batch_first
    exact = sum(length**2 for row in lengths for length in row)
    assert len(buckets.sizes) <= 1 + math.log(size) / math.log(RATIO)
    assert len(buckets.tokens_R) == sum(number * longest for number, longest in buckets.sizes)
    assert len(buckets.tokens_R) - len(buckets.empty) == 8 * size <= len(buckets.tokens_R)
    assert len(buckets.tokens_R) <= RATIO * 8 * size
    assert sum(number * longest**2 for number, longest in buckets.sizes) <= RATIO**2 * exact
    assert torch.equal(buckets.tokens_R[buckets.places_T], torch.arange(8 * size))


def test_transformer_engines_form() -> None:
    packed = packed_sequences(pieces_of(borders_of([[3, 1, 2], [6], [1, 5]])))
    assert packed.qkv_format == "thd"
    for bounds in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert bounds.dtype == torch.int32
        assert bounds.tolist() == [0, 3, 4, 6, 12, 13, 18]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 6


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


@pytest.mark.parametrize("mean", [3, 100, 400])
def test_nothing_grows_faster_than_the_tokens(mean: int) -> None:
    rows, heads = 2, 2
    for size in (512, 1024, 2048):
        lengths = [random_lengths(size, mean, row) for row in range(rows)]
        parts = inputs(lengths, heads, heads)
        with _Largest() as largest:
            with_gradients(attend(*parts, pieces_of(borders_of(lengths)).sequence_first), parts)
        assert rows * size * heads * WIDTH <= largest.elements
        assert largest.elements <= RATIO * rows * size * heads * WIDTH < rows * heads * size**2


def _kept(parts: list[Tensor], pieces: Pieces | None) -> int:
    """Bytes that autograd keeps of a forward pass."""
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = through_core(parts, pieces)
    assert out.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("groups", [4, 2])
def test_no_more_is_kept_than_by_plain_attention_and_the_padding(groups: int) -> None:
    lengths = [random_lengths(1024, 100, row) for row in range(4)]
    parts, pieces = inputs(lengths, 4, groups), pieces_of(borders_of(lengths))
    places = len(pieces.sequence_first.tokens_R)
    assert _kept(parts, pieces) <= _kept(parts, None) * places / (4 * 1024)
