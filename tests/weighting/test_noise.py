"""Signal-to-noise against alignments made with a known one."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.config.load import load_config
from megatron_dwm.weighting.noise import SignalToNoise, signal_to_noise, why_no_noise


@pytest.mark.parametrize("ratio", [0.2, 1.0, 5.0])
def test_ratio_is_recovered(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 100_000
    signal = torch.randn(n, generator=generator) * ratio**0.5
    # The whole batch's noise has variance 1; half a batch has twice that.
    halves = [signal + 2**0.5 * torch.randn(n, generator=generator) for _ in range(2)]
    found = signal_to_noise(*halves)
    # A correlation over n samples is uncertain by 1/sqrt(n) = 0.3 %.
    assert found.agreement == pytest.approx(ratio / (ratio + 2), abs=0.015)
    assert found.ratio == pytest.approx(ratio, rel=0.05)


def test_ends() -> None:
    ramp = torch.arange(8.0)
    assert signal_to_noise(ramp, ramp).ratio > 1e6
    opposed = signal_to_noise(ramp, -ramp)
    assert opposed.agreement == pytest.approx(-1.0) and opposed.ratio == 0.0
    assert signal_to_noise(torch.ones(8), ramp) == SignalToNoise(0.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "replicas", "measured"),
    [
        (["--policy.name", "dwm"], 1, False),
        (["--policy.name", "dwm"], 2, False),
        (["--policy.name", "dwm", "--weighting.probe_fraction", "0.75"], 1, True),
        (["--policy.name", "dwm", "--training.micro_batch_size", "4"], 1, True),
        (["--policy.name", "dwm", "--weighting.update_on", "training"], 1, True),
        (["--policy.name", "gradient_alignment"], 1, True),
    ],
    ids=str,
)
def test_two_probed_samples_always_correlate(
    arguments: list[str], replicas: int, measured: bool
) -> None:
    sizes = ["--training.global_batch_size", "4", "--training.micro_batch_size", "1"]
    config = load_config(["--weighting.mode", "online", *sizes, *arguments])
    assert (why_no_noise(config, 2, replicas) is None) is measured
