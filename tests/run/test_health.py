"""Warnings about weights and alignments come once and say what to do."""

from __future__ import annotations

from megatron_dwm.run.health import Health
from megatron_dwm.weighting.dwm import Dwm


def test_warnings_come_once_and_name_the_keys() -> None:
    said: list[str] = []
    watch = Health(
        min_effective_sample_size=0.2,
        min_signal_to_noise=0.5,
        gentler=Dwm.gentler,
        warn=said.append,
    )
    watch.effective_sample_size(0.3)
    for _ in range(4):
        watch.signal_to_noise(0.1)
    assert said == []
    for _ in range(3):
        watch.effective_sample_size(0.1)
        watch.signal_to_noise(0.1)
    assert len(said) == 2
    assert "weighting.min_effective_sample_size" in said[0]
    assert "validation.batch_size" in said[1]
