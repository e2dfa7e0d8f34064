"""Noisy alignments move the weighting model less."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.weighting.noise import Reliability
from tests.launch import run_ranks


def test_reliability_is_the_least_squares_factor() -> None:
    """Of all factors f, signal / (signal + noise) brings f * (s + e) closest to s."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(200_000, generator=generator) * 0.7**0.5
    measured = signal + torch.randn(200_000, generator=generator)
    best = float((measured * signal).sum() / measured.square().sum())
    found = Reliability()
    assert found.factor == 1.0
    found.observe(0.7)
    assert found.factor == pytest.approx(best, abs=0.01)  # 200,000 draws: 1/sqrt(n) = 0.002
    found.observe(3.0)  # 0.75 alone; a running mean keeps 0.8
    assert found.factor == pytest.approx(0.8 * 0.7 / 1.7 + 0.2 * 0.75, abs=1e-9)
    for _ in range(60):
        found.observe(3.0)
    assert found.factor == pytest.approx(0.75, abs=1e-5)


def test_damping_shortens_an_update() -> None:
    cases = [
        {"damp": False, "signal_to_noise": 1.0},
        {"damp": True, "signal_to_noise": 1.0},
        {"damp": True, "signal_to_noise": 1e12},
    ]
    [full], [damped], [trusted] = run_ranks("tests.weighting.workers:moved_by_an_update", 1, cases)
    assert float(full.abs().max()) > 0
    torch.testing.assert_close(damped, 0.5 * full, rtol=1e-3, atol=1e-7)  # float32 parameters
    torch.testing.assert_close(trusted, full, rtol=1e-3, atol=1e-7)
