"""Warnings about weights and alignments come once and say what to do."""

from __future__ import annotations

from megatron_dwm.run.health import Health
from megatron_dwm.weighting.dwm import Dwm


def _health(said: list[str]) -> Health:
    return Health(
        min_effective_sample_size=0.2,
        min_signal_to_noise=0.5,
        gentler=Dwm.gentler,
        warn=said.append,
    )


def test_warnings_come_once_and_name_the_keys() -> None:
    said: list[str] = []
    watch = _health(said)
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


def test_a_held_out_domain_that_rises_twice_is_named_once() -> None:
    said: list[str] = []
    watch = _health(said)
    for web, code in ((5.0, 5.0), (4.5, 4.5), (4.7, 4.6), (4.5, 4.61), (4.4, 4.7), (4.3, 4.7)):
        watch.held_out({"web": web, "code": code})
    [line] = said
    assert "loss of code rises: 4.700, after a best of 4.500" in line
    assert "policy.name uniform" in line
