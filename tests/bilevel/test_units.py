"""Documents as units against each document run alone, in double precision, under every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.launch import run_ranks

WORKERS = "tests.bilevel.unit_workers"
# fp32 sums of a few thousand terms, each of relative error 6e-8, with cancellation.
TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-6

OPTIONS = [
    {"border_loss": False, "uncounted": 0.2},
    {"equal": True},
    {"border_loss": False, "equal": True, "uncounted": 0.5},
    {"uncounted": 0.2},
]
QWEN3 = {"qk_layernorm": True, "kv_channels": 12}
QWEN2 = {"add_qkv_bias": True}
MODEL_KEYS = ("inner", "clip", "tied", "query_groups", "layers", *QWEN3, *QWEN2)
# Processes, layout, and number of the options.
LAYOUTS: list[tuple[int, dict[str, Any], int]] = [
    *((1, {}, number) for number in range(len(OPTIONS))),
    (1, {"clip": 0.2, "tied": False}, 1),
    (1, {"inner": "sgd", "clip": 0.2}, 0),
    (1, {"flattened": True}, 0),
    (1, {"recompute": "full"}, 3),
    (1, {"recompute": "selective"}, 1),
    (2, {"tensor": 2}, 0),
    (2, {"tensor": 2, "sequence": True, "tied": False, "clip": 0.2}, 1),
    (2, {"tensor": 2, "sequence": True, "flattened": True}, 3),
    (2, {"tensor": 2, "recompute": "selective"}, 2),
    *(
        (ranks, {**layout, **model}, 0)
        for model in (QWEN3, QWEN2)
        for ranks, layout in ((1, {}), (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2}))
    ),
    (2, {"pipeline": 2}, 0),
    (2, {"pipeline": 2, "tied": False, "clip": 0.2, "recompute": "full"}, 1),
    (2, {"pipeline": 2, "flattened": True}, 3),
    (2, {"pipeline": 2, "virtual_stages": 2, "layers": 4}, 2),
    (2, {}, 0),
    (2, {}, 2),
    (2, {"sharded": True}, 1),
    (2, {"context": 2}, 0),
    (2, {"context": 2, "recompute": "full", "sharded": True, "clip": 0.2}, 1),
    (2, {"context": 2, "recompute": "selective", "tied": False}, 2),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True}, 3),
    (4, {"tensor": 2, "sharded": True}, 2),
    (4, {"context": 4}, 3),
    (4, {"context": 2, "tensor": 2, "sequence": True}, 1),
    (4, {"context": 2, "pipeline": 2}, 3),
    (4, {"context": 2, "sharded": True}, 0),
]
CASES = [(size, {**layout, "options": OPTIONS[number]}) for size, layout, number in LAYOUTS]


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def _run(function: str, cases: list[tuple[int, dict[str, Any]]]) -> list[list[Any]]:
    """Returns what every rank found, by the number of the case."""
    found: list[list[Any]] = [[] for _ in cases]
    for size in sorted({size for size, _ in cases}):
        numbers = [number for number, (of_case, _) in enumerate(cases) if of_case == size]
        ranks = run_ranks(f"{WORKERS}:{function}", size, [cases[number][1] for number in numbers])
        for number, of_case in zip(numbers, ranks, strict=True):
            found[number] = of_case
    return found


def _by_hand(function: str, cases: list[dict[str, Any]], keys: tuple[str, ...]) -> list[Any]:
    """Returns what one process finds for each case; layouts of a model are computed once."""
    models = [{key: case[key] for key in keys if key in case} for case in cases]
    different = {str(model): model for model in models}
    ranks = run_ranks(f"{WORKERS}:{function}", 1, list(different.values()))
    found = dict(zip(different, [rank for [rank] in ranks], strict=True))
    return [found[str(model)] for model in models]


@pytest.fixture(scope="module")
def found() -> list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]]:
    """For every case: by hand, and what every rank found."""
    expected = _by_hand("by_hand", [case for _, case in CASES], ("options", *MODEL_KEYS))
    return list(zip(expected, _run("alignments", CASES), strict=True))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_alignments_are_autograds_of_each_document_alone(found: list, number: int) -> None:
    by_hand, ranks = found[number]
    for rank in ranks:
        for name in ("alignments", "gradient"):
            assert _relative(rank[name], by_hand[name]) < TOLERANCE, name


def test_documents_without_a_counted_token_have_no_alignment(found: list) -> None:
    for by_hand, ranks in found:
        uncounted = by_hand["alignments"] == 0.0
        assert all(torch.equal(rank["alignments"] == 0.0, uncounted) for rank in ranks)
    assert int((found[0][0]["alignments"] == 0.0).sum()) > 3


def test_estimators_agree() -> None:
    cases = [{"options": options} for options in OPTIONS[:3]]
    cases[1] |= {"inner": "sgd", "clip": 0.2, "tied": False}
    for [(probed, unrolled, differenced)] in run_ranks(f"{WORKERS}:estimators", 1, cases):
        assert _relative(probed, unrolled) < TOLERANCE
        # As for rows: rounding of a loss, divided by its change (test_hypergradient.py).
        assert _relative(differenced, unrolled) < 5e-3


def test_halves_of_the_validation_batch_add_up() -> None:
    for size in (1, 2):
        for ranks in run_ranks(f"{WORKERS}:halves", size, [{"options": OPTIONS[0]}]):
            for of_halves, whole in ranks:
                assert _relative(of_halves, whole) < TOLERANCE


FEATURE_CASES: list[tuple[int, dict[str, Any]]] = [
    (size, {**layout, "options": options, "layers": 4, "early_layer": early})
    for size, layout, options, early in [
        (1, {}, {"border_loss": False, "uncounted": 0.2}, 1),
        (1, {}, {"unit": "sample"}, 3),
        (1, {"flattened": True}, {"uncounted": 0.2}, 3),
        (1, {"flattened": True}, {"unit": "sample"}, 3),
        (2, {"tensor": 2}, {"border_loss": False}, 1),
        (2, {"tensor": 2, "sequence": True}, {"uncounted": 0.2}, 3),
        (2, {"tensor": 2, "sequence": True, "flattened": True}, {"uncounted": 0.2}, 3),
        (2, {"tensor": 2, "sequence": True, "flattened": True}, {"unit": "sample"}, 1),
        (2, {"pipeline": 2}, {"border_loss": False}, 1),
        (2, {"pipeline": 2, "flattened": True}, {"border_loss": False}, 1),
        (2, {"pipeline": 2, "virtual_stages": 2}, {}, 2),
        (2, {}, {"border_loss": False}, 1),
        (2, {"context": 2}, {"border_loss": False}, 1),
        (2, {"context": 2}, {"unit": "sample"}, 3),
        (4, {"context": 2, "tensor": 2, "sequence": True}, {"uncounted": 0.2}, 3),
        (4, {"context": 2, "tensor": 2, "sequence": True}, {"unit": "sample"}, 1),
        (4, {"context": 2, "pipeline": 2}, {"border_loss": False}, 1),
        (4, {"tensor": 2, "pipeline": 2, "sequence": True}, {"uncounted": 0.2}, 1),
    ]
]


def test_losses_and_features_are_those_of_each_document_alone() -> None:
    keys = ("options", "early_layer", "layers")
    expected = _by_hand("losses_and_features_by_hand", [case for _, case in FEATURE_CASES], keys)
    for (_, case), by_hand, ranks in zip(
        FEATURE_CASES, expected, _run("losses_and_features", FEATURE_CASES), strict=True
    ):
        for rank in ranks:
            torch.testing.assert_close(
                rank["losses"].double(),
                by_hand["losses"],
                rtol=LOSS_TOLERANCE,
                atol=0,
                msg=str(case),
            )
            for name in ("early", "final"):
                assert _relative(rank[name], by_hand[name]) < LOSS_TOLERANCE, (case, name)


def test_borders_matter_to_the_losses() -> None:
    cases = [{"options": {"borders": borders}} for borders in (True, False)]
    [[with_borders]], [[without]] = (
        [ranks] for ranks in run_ranks(f"{WORKERS}:losses_and_features", 1, cases)
    )
    changed = (with_borders["losses"] - without["losses"]).abs() / with_borders["losses"]
    assert float(changed.max()) > 100 * LOSS_TOLERANCE
