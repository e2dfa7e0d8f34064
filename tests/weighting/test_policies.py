"""What the policies do with their alignments, beyond one update of one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.launch import run_ranks

WORKERS = "tests.weighting.policy_workers"


def test_a_group_with_one_sample_on_top_comes_back() -> None:
    """Two and three samples, the bound active, the alignments against the one on top."""
    cases = [{"size": size, "updates": 60} for size in (2, 3)]
    for [(up, down)] in run_ranks(f"{WORKERS}:up_and_down", 1, cases):
        assert up > 1.7 and down < 0.3


DAMPED = {"learning_rate": 3e-3, "damp_by_noise": True}
RESUMED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"learning_rate": 3e-3}, {"learning_rate": 1e-4}),
    ({"weight_decay": 0.5}, {"weight_decay": 0.0}),
    ({}, {"weight_decay": 20.0}),
    (DAMPED, {"learning_rate": 3e-3}),
    ({"learning_rate": 3e-3}, DAMPED),
    (DAMPED, {**DAMPED, "learning_rate": 1e-3}),
]


def test_a_resumed_update_has_the_configured_rate_and_decay() -> None:
    cases = [{"before": before, "now": now} for before, now in RESUMED]
    found = run_ranks(f"{WORKERS}:step_after_taking_up", 1, cases)
    for case, [(ours, expected)] in zip(cases, found, strict=True):
        # float32 parameters of size 0.1 to 1, against double precision.
        torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=2e-8, msg=str(case))


@pytest.mark.parametrize("world_size", [1, 2])
def test_domain_means_are_of_the_alignments_asked_for(world_size: int) -> None:
    cases = [{"standardize": standardize} for standardize in (True, False)]
    for ranks in run_ranks(f"{WORKERS}:domain_weights", world_size, cases):
        for ours, by_hand in ranks:
            torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)
            assert float(ours.std()) > 0.05, "weights are not uniform"
