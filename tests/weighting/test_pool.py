"""Rows chosen from a pool: one choice for all ranks, of all replicas' candidates."""

from __future__ import annotations

import torch

from tests.launch import run_ranks
from tests.weighting.pool_workers import CANDIDATES, KEPT, largest

WORKER = "tests.weighting.pool_workers:chosen"
LAYOUTS = [({}, 1), ({}, 2), ({"tensor": 2}, 2), ({"pipeline": 2}, 2)]
BAD = [0, 5, 6, 11]
TOO_MANY = list(range(CANDIDATES - KEPT + 1))


def test_layouts_choose_alike_and_only_candidates_with_finite_scores() -> None:
    cases = [{"bad": bad} for bad in ([], BAD, TOO_MANY)]
    alone = [rows for [rows] in run_ranks(WORKER, 1, cases)]
    assert len(alone[0]) == KEPT and not set(alone[1]) & set(BAD)
    assert alone[2] == [], "an error on every rank"
    for layout, size in LAYOUTS[1:]:
        found = run_ranks(WORKER, size, [{**case, **layout} for case in cases])
        assert found == [[rows] * size for rows in alone], layout


def test_ranks_go_on_alike_if_their_scores_differ() -> None:
    """As they may by rounding."""
    [ranks] = run_ranks(WORKER, 2, [{"bad": [], "differ": True, "tensor": 2}])
    assert ranks[0] == ranks[1] and len(ranks[0]) == KEPT


def test_without_a_choice_of_its_own_a_method_keeps_the_largest_and_the_first_of_equals() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0])
    assert largest(scores, 2).tolist() == [1, 3]
