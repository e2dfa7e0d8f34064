"""Units of different sizes: what the guards, the statistics and standardization count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_dwm.weighting.concentration import (
    effective_sample_size,
    normalized_entropy,
    temperature,
    weights_from_logits,
)
from megatron_dwm.weighting.standardize import centered, standardize
from tests.weighting.unit_workers import softmax_by_hand

GUARDS = [(0.0, 0.0), (0.5, 0.0), (0.9, 0.2)]
SCALES = [0.1, 3.0, 100.0]


def _draw(groups: int, size: int, scale: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, size, generator=generator, dtype=torch.float64) * scale


def _sizes(groups: int, size: int, smallest: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(smallest, 40, (groups, size), generator=generator).double()
    sizes[:, 0] = 7.0
    return sizes


def _weights(logits: Tensor, sizes: Tensor | None, guards: tuple[float, float]) -> Tensor:
    bound, floor = guards
    return weights_from_logits(logits, sizes, min_effective_sample_size=bound, uniform_floor=floor)


@pytest.mark.parametrize("guards", GUARDS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [1.0, 16.0])
def test_equal_sizes_are_no_sizes(size: float, scale: float, guards: tuple) -> None:
    logits, sizes = _draw(10, 12, scale), torch.full((10, 12), size, dtype=torch.float64)
    weights = _weights(logits, None, guards)
    torch.testing.assert_close(_weights(logits, sizes, guards), weights, rtol=1e-6, atol=1e-12)
    for statistic in (effective_sample_size, normalized_entropy):
        torch.testing.assert_close(statistic(weights, sizes), statistic(weights))
    for function in (standardize, centered):
        found, plain = function(logits, weights, sizes), function(logits, weights)
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("guards", GUARDS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_weights_are_those_of_tokens_as_samples(scale: float, guards: tuple) -> None:
    """A unit of size s weighs as each of s samples with its logit."""
    logits, sizes = _draw(6, 9, scale), _sizes(6, 9)
    found = _weights(logits, sizes, guards)
    for logits_n, sizes_n, found_n in zip(logits, sizes.long(), found, strict=True):
        many = _weights(logits_n.repeat_interleave(sizes_n)[None], None, guards)[0]
        expected = many[sizes_n.cumsum(0) - 1]
        torch.testing.assert_close(found_n, expected, rtol=1e-6, atol=1e-12)
        by_hand = softmax_by_hand(logits_n, sizes_n.double(), guards[0])
        expected = by_hand * (1.0 - guards[1]) + guards[1]
        torch.testing.assert_close(found_n, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("guards", GUARDS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_a_unit_split_in_two_changes_nothing(scale: float, guards: tuple) -> None:
    logits, sizes = _draw(6, 9, scale), _sizes(6, 9)
    split_logits = torch.cat([logits, logits[:, :1]], dim=1)
    split_sizes = torch.cat([sizes, torch.full((6, 1), 3.0)], dim=1)
    split_sizes[:, 0] = 4.0
    whole, split = _weights(logits, sizes, guards), _weights(split_logits, split_sizes, guards)
    torch.testing.assert_close(split[:, :-1], whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(split[:, -1], split[:, 0])
    torch.testing.assert_close(
        effective_sample_size(split, split_sizes), effective_sample_size(whole, sizes)
    )
    values, split_values = (t.tanh() for t in (logits, split_logits))
    torch.testing.assert_close(
        standardize(split_values, split, split_sizes)[:, :-1],
        standardize(values, whole, sizes),
    )


@pytest.mark.parametrize("guards", GUARDS, ids=str)
@pytest.mark.parametrize("logit", [0.0, 1e4, -1e4])
def test_a_unit_of_size_zero_counts_nowhere(logit: float, guards: tuple) -> None:
    logits, sizes = _draw(6, 9, 3.0), _sizes(6, 9)
    more_logits = torch.cat([logits, torch.full((6, 2), logit)], dim=1)
    more_sizes = torch.cat([sizes, torch.zeros(6, 2)], dim=1)
    whole, more = _weights(logits, sizes, guards), _weights(more_logits, more_sizes, guards)
    assert bool(more.isfinite().all())
    torch.testing.assert_close(more[:, :-2], whole, rtol=1e-12, atol=1e-12)
    for statistic in (effective_sample_size, normalized_entropy):
        torch.testing.assert_close(statistic(more, more_sizes), statistic(whole, sizes))
    for function in (standardize, centered):
        found = function(more_logits, more, more_sizes)[:, :-2]
        torch.testing.assert_close(found, function(logits, whole, sizes))


@pytest.mark.parametrize("bound", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("scale", SCALES)
def test_effective_sample_size_is_held_in_shares(bound: float, scale: float) -> None:
    logits, sizes = _draw(20, 32, scale), _sizes(20, 32, smallest=0)
    weights, free = _weights(logits, sizes, (bound, 0.0)), _weights(logits, sizes, (0.0, 0.0))
    found, of_free = (effective_sample_size(w, sizes) for w in (weights, free))
    assert bool((found >= bound - 1e-9).all())
    torch.testing.assert_close(found, of_free.clamp(min=bound), rtol=1e-6, atol=0)
    means = (sizes * weights).sum(-1) / sizes.sum(-1)
    torch.testing.assert_close(means, torch.ones_like(means))
    assert bool((temperature(logits, bound, sizes)[of_free >= bound] == 1.0).all())


@pytest.mark.parametrize("logit", [0.0, 3.7])
def test_equal_logits_weigh_exactly_one(logit: float) -> None:
    sizes = _sizes(4, 11, smallest=0).float()
    weights = _weights(torch.full((4, 11), logit), sizes, (0.5, 0.0))
    assert torch.equal(weights, torch.ones(4, 11))


def test_derivative_is_that_of_tokens_as_samples() -> None:
    logits, sizes, values = _draw(1, 5, 2.0), _sizes(1, 5), _draw(1, 5, 1.0, seed=3)
    found = logits.clone().requires_grad_()
    (sizes * values * _weights(found, sizes, (0.6, 0.1))).sum().backward()
    expected = logits.clone().requires_grad_()
    counts = sizes[0].long()
    many = expected.repeat_interleave(counts, dim=1)
    (values.repeat_interleave(counts, dim=1) * _weights(many, None, (0.6, 0.1))).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-12)


def test_a_group_in_which_nothing_counts_weighs_one() -> None:
    logits = _draw(2, 4, 3.0).float().requires_grad_()
    sizes = torch.tensor([[0.0] * 4, [1.0, 2.0, 0.0, 3.0]])
    weights = _weights(logits, sizes, (0.5, 0.0))
    assert torch.equal(weights[0], torch.ones(4))
    advantage = standardize(_draw(2, 4, 1.0, seed=2).float(), weights.detach(), sizes)
    assert torch.equal(advantage[0], torch.zeros(4))
    (sizes * advantage * weights).sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())
    assert torch.equal(logits.grad[0], torch.zeros(4)) and bool((logits.grad[1] != 0).any())


def test_constant_values_are_standardized_to_zero() -> None:
    sizes = torch.tensor([[3.0, 1.0, 1.0, 0.0], [7.0, 0.0, 0.0, 0.0]])
    for value in (0.1, 5.545, -3e-7):
        values = torch.full((2, 4), value)
        values[:, -1] = 0.0  # what does not count is far away
        found = standardize(values, sizes_Gn=sizes)
        assert torch.equal(found, torch.zeros(2, 4)), value


def test_entropy_is_the_divergence_from_the_shares() -> None:
    sizes = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64)
    weights = torch.tensor([[2.0, 0.0, 1.2]], dtype=torch.float64)
    q = [1 / 8, 2 / 8, 5 / 8]
    p = [2 / 8, 0.0, 6 / 8]
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
    expected = 1.0 - divergence / math.log(8)
    assert float(normalized_entropy(weights, sizes)) == pytest.approx(expected, abs=1e-12)
    all_on_the_smallest = torch.tensor([[8.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(normalized_entropy(all_on_the_smallest, sizes)) == pytest.approx(0.0, abs=1e-12)
