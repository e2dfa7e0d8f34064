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
# Documents of 10, 30 and 24, and of 34 and 30 tokens; the rows are cut at every 16 or 8 tokens.
PARTS = {
    2: [{"context": 2}, {"context": 2, "recompute": "full"}],
    4: [{"context": 4}, {"context": 2, "tensor": 2, "sequence": True}],
}
CASES = {
    1: [{"recompute": recompute} for recompute in ("none", "selective", "full")],
    2: [
        {"tensor": 2},
        {"tensor": 2, "sequence": True, "recompute": "selective"},
    ],
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


def test_documents_are_the_same_across_the_parts_of_rows(found: list[dict[str, Any]]) -> None:
    alone, gradient = found[0]["alone"], found[0]["gradient alone"]
    for size, cases in PARTS.items():
        ranks = run_ranks("tests.model.border_workers:parts_of_rows", size, cases)
        for case, of_case in zip(cases, ranks, strict=True):
            for rank in of_case:
                assert ((rank["packed"] - alone).abs() <= 1e-6 * alone).all(), case
                if "tensor" not in case:
                    assert _apart(rank["gradient"], gradient) < 1e-5, case
