"""An LLM on packed rows whose attention stops at borders computes what it does on each document.

The documents begin at different positions of their rows and at position 0 alone, so these tests
also show that rotary positions need not begin anew at a border.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from tests.launch import run_ranks

WORKER = "tests.model.border_workers:losses_and_gradients"
CASES = {
    1: [{"recompute": recompute} for recompute in ("none", "selective", "full")],
    2: [{"tensor": 2}, {"tensor": 2, "sequence": True, "recompute": "selective"}],
}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return [
        rank
        for size, cases in CASES.items()
        for ranks in run_ranks(WORKER, size, cases)
        for rank in ranks
    ]


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_token_losses_are_those_of_each_document_alone(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert ((rank["packed"] - rank["alone"]).abs() <= 1e-6 * rank["alone"]).all()
        # Without borders they are far off, but for the first document of a row.
        assert _apart(rank["without borders"], rank["alone"]) > 0.05


def test_gradients_are_those_of_each_document_alone(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert _apart(rank["gradient"], rank["gradient alone"]) < 1e-5


def test_layouts_and_recomputation_compute_the_same(found: list[dict[str, Any]]) -> None:
    for rank in found[1:]:
        assert _apart(rank["packed"], found[0]["packed"]) < 1e-6
    assert all(_apart(rank["gradient"], found[0]["gradient"]) == 0 for rank in found[1:3])
