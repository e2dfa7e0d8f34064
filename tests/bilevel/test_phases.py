"""The names in a trace of a hypergradient and their order, by torch's profiler on a CPU."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from megatron_dwm.bilevel import ESTIMATORS
from megatron_dwm.runtime.profiling import Phase
from tests.bilevel.workers import problem_of
from tests.launch import run_ranks
from tests.tiny import tiny

WAY_THERE = ["virtual step", "validation gradient", "direction", "restore"]
CASES: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"estimator": "tangent_probe"},
        ["virtual step", *WAY_THERE, "tangent probe", "restore"],
    ),
    (
        {"estimator": "tangent_probe", "halves": True},
        ["virtual step", *[*WAY_THERE, "tangent probe"] * 2, "restore"],
    ),
    (
        {"estimator": "finite_difference"},
        ["virtual step", *WAY_THERE, "finite difference", "restore"],
    ),
    ({"estimator": "unroll"}, ["unroll"]),
]


def phases(estimator: str, halves: bool = False) -> list[str]:
    """Names of the ranges of one hypergradient, by the time that they began."""
    with tiny() as subject:
        problem = problem_of(subject)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recording:
            ESTIMATORS[estimator](problem, halves=halves)
        # The process groups annotate their collectives, too.
        found = [event for event in recording.events() if event.name in get_args(Phase)]
        return [event.name for event in sorted(found, key=lambda event: event.time_range.start)]


@pytest.fixture(scope="module")
def found() -> list[list[str]]:
    cases = [case for case, _ in CASES]
    return [names for [names] in run_ranks("tests.bilevel.test_phases:phases", 1, cases)]


def test_every_part_of_an_update_has_a_name(found: list[list[str]]) -> None:
    for (case, expected), names in zip(CASES, found, strict=True):
        assert names == expected, case
