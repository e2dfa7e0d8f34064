"""Groups of documents, whose sizes and numbers vary, against each group by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tests.launch import run_ranks

WORKERS = "tests.weighting.unit_workers"
TOKENS = {"border_loss": False, "uncounted": 0.2}
EQUAL = {"equal": True}
LAYOUTS: list[tuple[int, dict[str, int]]] = [
    (1, {}),
    (2, {}),
    (2, {"tensor": 2}),
    (2, {"pipeline": 2}),
    (4, {"tensor": 2}),
    # Four ranks encode six rows: the last one has none of its own.
    (4, {"tensor": 2, "pipeline": 2, "rows": 6}),
]
GROUPS = ("micro_batch", "global")
CASES: list[tuple[int, dict[str, Any]]] = [
    (size, {"encoder": encoder, "group": group, "options": options, **layout})
    for size, layout in LAYOUTS
    for encoder, group, options in product(("own", "llm"), GROUPS, (TOKENS, EQUAL))
    # Both kinds of shares in one process, one of the two elsewhere.
    if size == 1 or (options is TOKENS) == (encoder == "own")
]
CASES.append((2, {"encoder": "own", "group": "global", "options": TOKENS, "standardize": False}))
RULES: list[tuple[int, dict[str, Any]]] = [
    (size, {"policy": policy, "group": group, "options": options, **layout})
    for policy, group in product(("domain_mean", "loss_reweighting"), GROUPS)
    for size, layout, options in [
        (1, {}, EQUAL),
        (2, {}, TOKENS),
        (2, {"tensor": 2}, TOKENS),
        (2, {"pipeline": 2}, EQUAL),
        (4, {"tensor": 2}, EQUAL),
    ]
]
RULES.append(
    (2, {"policy": "domain_mean", "group": "global", "options": TOKENS, "standardize": False})
)


def _run(function: str, cases: list[tuple[int, dict[str, Any]]]) -> list[list[Any]]:
    """Returns what every rank found, by the number of the case."""
    found: list[list[Any]] = [[] for _ in cases]
    for size in sorted({size for size, _ in cases}):
        numbers = [number for number, (of_case, _) in enumerate(cases) if of_case == size]
        ranks = run_ranks(f"{WORKERS}:{function}", size, [cases[number][1] for number in numbers])
        for number, of_case in zip(numbers, ranks, strict=True):
            found[number] = of_case
    return found


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, tuple[torch.Tensor, torch.Tensor]]]]:
    return _run("dwm_weights_and_gradient", CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_weights_and_updates_are_those_of_each_group_alone(found: list, number: int) -> None:
    # All is in float64, but the angles of the encoder's rotary positions are in float32, and those
    # of a document are not the same inside a row.
    tolerance = 5e-6 if CASES[number][1]["encoder"] == "own" else 1e-9
    for rank in found[number]:
        weights, by_hand = rank["weights"]
        assert float(by_hand.std()) > 0.2, "weights are far from uniform"
        torch.testing.assert_close(weights, by_hand, rtol=tolerance, atol=tolerance)
        gradient, by_hand = rank["gradient"]
        assert float((gradient - by_hand).norm() / by_hand.norm()) < tolerance


def test_rules_weigh_documents_in_their_shares() -> None:
    for (_, case), ranks in zip(RULES, _run("rule_weights", RULES), strict=True):
        for weights, by_hand in ranks:
            assert float(by_hand.std()) > 0.05, (case, "weights are not uniform")
            error = (weights - by_hand).abs() / by_hand
            assert float(error.max()) < 2e-5, case  # float32 alignments and losses
