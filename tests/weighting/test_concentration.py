"""From logits to weights: the guards, the exact uniform start, the way back from the bound."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.weighting.concentration import (
    effective_sample_size,
    normalized_entropy,
    weights_from_logits,
)
from megatron_dwm.weighting.standardize import standardize
from tests.weighting.fixed_temperature import temperature_by_root


def _logits(groups: int, size: int, scale: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, size, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 49, 333])
@pytest.mark.parametrize("bound", [0.0, 0.5])
@pytest.mark.parametrize("value", [0.0, 3.7])
def test_equal_logits_weigh_exactly_one(size: int, bound: float, value: float) -> None:
    logits = torch.full((3, size), value)
    weights = weights_from_logits(logits, min_effective_sample_size=bound, uniform_floor=0.0)
    assert torch.equal(weights, torch.ones(3, size))


@pytest.mark.parametrize("bound", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0, 1e8, 1e200])
def test_effective_sample_size_is_held(bound: float, scale: float) -> None:
    logits = _logits(20, 32, scale)
    weights = weights_from_logits(logits, min_effective_sample_size=bound, uniform_floor=0.0)
    free = weights_from_logits(logits, min_effective_sample_size=0.0, uniform_floor=0.0)
    sizes, free_sizes = effective_sample_size(weights), effective_sample_size(free)
    # Forty bisections of log T over 14 leave 1e-11 of it.
    assert bool((sizes >= bound - 1e-9).all())
    torch.testing.assert_close(sizes, free_sizes.clamp(min=bound), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.mean(-1), torch.ones(20, dtype=torch.float64))
    assert bool((weights >= 0).all())


def test_floor_is_mixed_in() -> None:
    logits = _logits(4, 8, 5.0)
    plain = weights_from_logits(logits, min_effective_sample_size=0.0, uniform_floor=0.0)
    mixed = weights_from_logits(logits, min_effective_sample_size=0.0, uniform_floor=0.3)
    torch.testing.assert_close(mixed, 0.7 * plain + 0.3)


@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
def test_derivative_is_that_at_a_fixed_temperature(scale: float) -> None:
    """Where the bound is active; elsewhere the temperature is 1 and it is the derivative."""
    bound, floor, h = 0.6, 0.1, 1e-6
    logits, coefficients = _logits(3, 6, scale).requires_grad_(), _logits(3, 6, 1.0, seed=7)
    weights = weights_from_logits(logits, min_effective_sample_size=bound, uniform_floor=floor)
    temperature_G1 = temperature_by_root(logits.detach(), bound)[:, None]
    assert bool((temperature_G1 > 1).any()) == (scale > 1), "both cases are here"
    (weights * coefficients).sum().backward()

    def at_fixed_temperature(logits: torch.Tensor) -> torch.Tensor:
        held = torch.softmax(logits / temperature_G1, -1) * 6 * (1 - floor) + floor
        return (held * coefficients).sum(-1)

    for column in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[column] = h
        ends = [at_fixed_temperature(logits.detach() + sign * step) for sign in (1, -1)]
        difference = (ends[0] - ends[1]) / (2 * h)
        torch.testing.assert_close(logits.grad[:, column], difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("logits", "advantage"),
    [([5.0, 0.0], [-1.0, 1.0]), ([5.0, 0.0, 0.0], [-2.0, 1.0, 1.0])],
    ids=["two", "three"],
)
def test_a_sample_on_top_can_come_down(logits: list[float], advantage: list[float]) -> None:
    """What it should lose lies along the logits' scale, on which held weights do not depend."""
    logits_n, advantage_n = torch.tensor([logits]).requires_grad_(), torch.tensor([advantage])
    guards = {"min_effective_sample_size": 0.6, "uniform_floor": 0.0}
    assert float(effective_sample_size(weights_from_logits(logits_n.detach(), **guards))) < 0.601
    for _ in range(100):
        objective = (weights_from_logits(logits_n, **guards) * advantage_n).mean()
        [gradient_n] = torch.autograd.grad(objective, logits_n)
        logits_n = (logits_n + 0.3 * gradient_n).detach().requires_grad_()
    assert float(weights_from_logits(logits_n.detach(), **guards)[0, 0]) < 0.5


def test_statistics_at_their_ends() -> None:
    ones, one = torch.ones(2, 5), torch.tensor([[5.0, 0, 0, 0, 0]])
    assert torch.equal(effective_sample_size(ones), torch.ones(2))
    torch.testing.assert_close(effective_sample_size(one), torch.tensor([0.2]))
    torch.testing.assert_close(normalized_entropy(ones), torch.ones(2))
    assert float(normalized_entropy(one)) == 0.0


def test_standardized_alignments_have_weighted_mean_zero_and_unit_spread() -> None:
    alignment = _logits(3, 16, 1e-7, seed=1)
    weights = weights_from_logits(
        _logits(3, 16, 1.0), min_effective_sample_size=0.0, uniform_floor=0.0
    )
    found = standardize(alignment, weights)
    weighted_mean = (found * weights).mean(-1)
    torch.testing.assert_close(
        weighted_mean, torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(found.std(-1, correction=0), torch.ones(3, dtype=torch.float64))
    assert torch.equal(standardize(torch.ones(1, 4), torch.ones(1, 4)), torch.zeros(1, 4))
