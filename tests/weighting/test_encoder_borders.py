"""The weighting model's own encoder inside documents gives the vectors of each document alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dwm.data import Batch
from megatron_dwm.model.layers.pieces import attend, pieces_of
from megatron_dwm.weighting.encoder import TokenEncoder, rotary_angles, rotate
from megatron_dwm.weighting.encoding import encode

LENGTHS = [[7, 1, 16], [24], [11, 13], [2, 20, 2], [23, 1]]
CHUNK = 2


def batch_of(tokens_BS: Tensor) -> Batch:
    """Rows whose documents, of `LENGTHS` tokens, are units."""
    chosen = LENGTHS[: len(tokens_BS)]
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in chosen]
    return _batch(tokens_BS, sum(len(row) for row in chosen), torch.stack(numbers))


def rows_of(tokens_BS: Tensor) -> Batch:
    """Rows that are units, without borders."""
    return _batch(tokens_BS, len(tokens_BS), None)


def _batch(tokens_BS: Tensor, count: int, numbers_BS: Tensor | None) -> Batch:
    rows, length = tokens_BS.shape
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS,
        loss_mask_BS=torch.ones(rows, length),
        position_ids_BS=torch.arange(length).repeat(rows, 1),
        sample_ids_B=torch.arange(rows),
        document_ids_U=torch.arange(count),
        domains=("drawn",) * count,
        borders_BS=numbers_BS,
        units_BS=numbers_BS,
    )


@pytest.fixture
def encoder() -> TokenEncoder:
    torch.manual_seed(3)
    encoder = TokenEncoder(50, 32, 2, 4, 48)
    for parameter in encoder.parameters():
        if parameter.dim() > 1:  # attention is far from uniform then
            parameter.data.mul_(8)
    return encoder


@pytest.fixture
def tokens_BS() -> Tensor:
    return torch.randint(0, 50, (5, 24), generator=torch.Generator().manual_seed(1))


def _alone(encoder: TokenEncoder, tokens_BS: Tensor) -> Tensor:
    """The vector of every document, each in a pass of its own."""
    documents = [
        document[None]
        for row, lengths in zip(tokens_BS, LENGTHS, strict=True)
        for document in row.split(lengths)
    ]
    return torch.cat([encoder(document) for document in documents])


def _gradient(encoder: TokenEncoder, pooled_UD: Tensor) -> Tensor:
    arbitrary = torch.linspace(-9, 9, pooled_UD.numel()).sin().view_as(pooled_UD)
    gradients = torch.autograd.grad(pooled_UD, list(encoder.parameters()), arbitrary)
    return torch.cat([gradient.flatten() for gradient in gradients])


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk", [CHUNK, len(LENGTHS)])
def test_vectors_and_gradients_are_those_of_each_document_alone(
    encoder: TokenEncoder, tokens_BS: Tensor, chunk: int
) -> None:
    found = encode(encoder, batch_of(tokens_BS), chunk, bf16=False)
    expected = _alone(encoder, tokens_BS)
    assert found.shape == (11, 32) and _apart(found, expected) < 1e-6
    assert _apart(_gradient(encoder, found), _gradient(encoder, expected)) < 1e-5


def test_vectors_stay_in_fp32_when_products_are_in_bf16(
    encoder: TokenEncoder, tokens_BS: Tensor
) -> None:
    found = encode(encoder, batch_of(tokens_BS), CHUNK, bf16=True)
    assert found.dtype == torch.float32
    expected = torch.cat(
        [
            encode(encoder, rows_of(document), 1, bf16=True)
            for document in tokens_BS[0][None].split(LENGTHS[0], dim=1)
        ]
    )
    # bf16 keeps 8 bits of a value; with kernels of other sizes other values round up.
    assert _apart(found[:3], expected) < 0.02


def test_rows_of_one_piece_change_nothing(encoder: TokenEncoder, tokens_BS: Tensor) -> None:
    whole = pieces_of(torch.zeros_like(tokens_BS))
    assert torch.equal(encoder(tokens_BS, whole), encoder(tokens_BS))
    assert torch.equal(encoder(tokens_BS), encode(encoder, rows_of(tokens_BS), 5, bf16=False))


def test_rows_are_pooled_if_no_units_are_given(encoder: TokenEncoder, tokens_BS: Tensor) -> None:
    pooled_BD = encoder(tokens_BS, pieces_of(batch_of(tokens_BS).borders_BS))
    means_UD = _alone(encoder, tokens_BS)
    rows = means_UD.split([len(row) for row in LENGTHS])
    expected = [
        torch.tensor(lengths, dtype=torch.float32) @ means / sum(lengths)
        for lengths, means in zip(LENGTHS, rows, strict=True)
    ]
    assert _apart(pooled_BD, torch.stack(expected)) < 1e-6


def test_neighbors_do_not_change_a_document_by_a_bit(
    encoder: TokenEncoder, tokens_BS: Tensor
) -> None:
    other_BS = tokens_BS.clone()
    other_BS[0, :8], other_BS[3:] = 0, 1
    one, other = (encode(encoder, batch_of(t), 5, bf16=False) for t in (tokens_BS, other_BS))
    assert torch.equal(one[2:6], other[2:6]) and not torch.equal(one[:2], other[:2])


def test_positions_may_go_on_over_borders() -> None:
    """Rotary embeddings make attention a function of distances: where a document's positions begin
    changes rounding only.
    """
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor(LENGTHS[0])
    query, key, value = torch.randn(3, 1, 2, 24, 8, generator=generator, dtype=torch.float64)
    cos, sin = (angles.double() for angles in rotary_angles(24, 8, query.device))
    anew = torch.cat([torch.arange(length) for length in lengths])
    buckets = pieces_of(torch.arange(3).repeat_interleave(lengths)[None]).batch_first
    going_on, beginning_anew = (
        attend(*(part.transpose(1, 2) for part in (*rotated, value)), buckets)
        for rotated in (
            (rotate(query, (cos, sin)), rotate(key, (cos, sin))),
            (rotate(query, (cos[anew], sin[anew])), rotate(key, (cos[anew], sin[anew]))),
        )
    )
    assert not torch.equal(going_on, beginning_anew)
    # The angles themselves are rounded to fp32.
    assert _apart(going_on, beginning_anew) < 1e-6
