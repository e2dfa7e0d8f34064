"""Alignments inside the training pass, against autograd in double precision, under every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.launch import run_ranks

WORKERS = "tests.bilevel.ahead_workers"
# fp32 sums of a few thousand terms, each of relative error 6e-8, with cancellation.
TOLERANCE = 1e-5
# For layouts, whose moments come from other sums: Adam amplifies their rounding, by the square root
# of a second moment near zero. The tolerance is the effect of rounding in one process.
ROUNDING_SEEDS = (1, 2, 3, 4)
# bf16 has 8 bits: z is rounded once, by 2e-3 in the mean, and a sum keeps the relative error.
BF16_BUFFER_TOLERANCE = 1e-2
# In a bf16 model every product is rounded; a chain of roundings is some tens of one.
BF16_TOLERANCE = 0.1

DOCUMENTS = {"border_loss": False, "uncounted": 0.2}
EQUAL_DOCUMENTS = {"equal": True}
QWEN3 = {"qk_layernorm": True, "kv_channels": 12}
QWEN2 = {"add_qkv_bias": True}
MODEL_KEYS = ("options", "inner", "clip", "tied", "query_groups", "layers", *QWEN3, *QWEN2)
# Processes, and the layout with its options. The model with untied embeddings has rows with second
# moments so small that rounding alone changes alignments by 4e-4; layouts of it take plain descent.
CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"tied": False, "query_groups": 4, "clip": 0.2}),
    (1, {"inner": "sgd"}),
    (1, {"halves": True}),
    (1, {"recompute": "full"}),
    (1, {"recompute": "selective", "tied": False}),
    (1, {"dtype": "bfloat16"}),
    (1, {"precision": "bf16"}),
    (1, {"options": DOCUMENTS}),
    (1, {"options": EQUAL_DOCUMENTS, "recompute": "full"}),
    (2, {}),
    (2, {"sharded": True}),
    (2, {"sharded": True, "precision": "bf16", "dtype": "bfloat16"}),
    (2, {"halves": True}),
    *((1, {"options": DOCUMENTS, **model}) for model in (QWEN3, QWEN2)),
    *((2, {"tensor": 2, "sequence": True, **model}) for model in (QWEN3, QWEN2)),
    *((2, {"pipeline": 2, **model}) for model in (QWEN3, QWEN2)),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence": True, "tied": False, "inner": "sgd"}),
    (2, {"tensor": 2, "sequence": True, "recompute": "full"}),
    (2, {"tensor": 2, "options": DOCUMENTS}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "tied": False, "recompute": "full", "inner": "sgd"}),
    (2, {"pipeline": 2, "virtual_stages": 2, "layers": 4}),
    (2, {"pipeline": 2, "virtual_stages": 2, "layers": 4, "options": DOCUMENTS}),
    (2, {"context": 2}),
    (2, {"context": 2, "sharded": True, "options": DOCUMENTS}),
    (4, {"tensor": 2, "context": 2, "sequence": True, "recompute": "full"}),
    (4, {"context": 2, "pipeline": 2, "options": EQUAL_DOCUMENTS}),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    (4, {"tensor": 2, "sharded": True, "options": EQUAL_DOCUMENTS}),
]


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def _run(cases: list[tuple[int, dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Returns what every rank found, by the number of the case."""
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    for size in sorted({size for size, _ in cases}):
        numbers = [number for number, (of_case, _) in enumerate(cases) if of_case == size]
        arguments = [cases[number][1] for number in numbers]
        for number, ranks in zip(
            numbers, run_ranks(f"{WORKERS}:alignments", size, arguments), strict=True
        ):
            found[number] = ranks
    return found


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, Any]]]:
    return _run(CASES)


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    """By autograd in one process, for every model among the cases."""
    models = [_model(case) for _, case in CASES]
    different = {str(model): model for model in models}
    ranks = run_ranks(f"{WORKERS}:by_hand", 1, list(different.values()))
    return dict(zip(different, [rank for [rank] in ranks], strict=True))


def _model(case: dict[str, Any]) -> dict[str, Any]:
    return {key: case[key] for key in MODEL_KEYS if key in case}


@pytest.fixture(scope="module")
def rounding_errors(expected: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Largest relative change of the alignments in one process, by model, from rounding alone."""
    models = {str(_model(case)): _model(case) for size, case in CASES if size > 1}
    cases = [{**model, "rounding_seed": s} for model in models.values() for s in ROUNDING_SEEDS]
    found = iter([rank for [rank] in run_ranks(f"{WORKERS}:alignments", 1, cases)])
    errors = dict.fromkeys((str(_model(case)) for _, case in CASES), 0.0)
    for name in models:
        for _ in ROUNDING_SEEDS:
            error = _relative(next(found)["alignments"], expected[name]["alignments"])
            errors[name] = max(errors[name], error)
    return errors


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_alignments_are_autograds_along_the_direction_of_the_paper(
    found: list, expected: dict, rounding_errors: dict[str, float], number: int
) -> None:
    size, case = CASES[number]
    # A layout rounds every product and sum, and the trials round once: allow 4 times theirs.
    rounding = 4 * rounding_errors[str(_model(case))] if size > 1 else 0.0
    assert rounding < 10 * TOLERANCE, "rounding alone would hide a mistake"
    tolerance = max(TOLERANCE, rounding)
    if case.get("dtype") == "bfloat16":
        tolerance = BF16_BUFFER_TOLERANCE
    if case.get("precision") == "bf16":
        tolerance = BF16_TOLERANCE
    by_hand = expected[str(_model(case))]
    for rank in found[number]:
        assert _relative(rank["alignments"], by_hand["alignments"]) < tolerance
        assert rank["val_loss"] == pytest.approx(by_hand["val_loss"], rel=tolerance)
        assert rank["known"].all()


def test_the_weighted_gradient_is_that_without_hooks_bit_for_bit(found: list) -> None:
    for ranks in found:
        assert all(rank["gradient unchanged"] and rank["gradient formed"] for rank in ranks)


def test_halves_of_the_validation_batch_differ_and_add_up(found: list) -> None:
    for (_, case), ranks in zip(CASES, found, strict=True):
        if case.get("halves"):
            for rank in ranks:
                assert _relative(rank["first"], rank["second"]) > 0.05


def test_the_first_micro_batches_are_probed() -> None:
    whole, half, quarter = _run([(1, {"fraction": part}) for part in (1.0, 0.5, 0.01)])
    for [part], count in ((half, 4), (quarter, 2)):
        assert part["known"].tolist() == [1.0] * count + [0.0] * (8 - count)
        assert torch.equal(part["alignments"][:count], whole[0]["alignments"][:count])
        assert not part["alignments"][count:].any()
        assert part["gradient unchanged"]


def test_alignments_add_up_to_the_inner_product_with_the_gradient_of_training() -> None:
    """Also where products are rounded: in bf16 and in emulated FP8, by unequal weights."""
    cases = [
        ({}, TOLERANCE),
        ({"fp8_emulation": True}, 1e-4),  # the layer's own scales and values, sums in fp32
        ({"fp8_emulation": True, "recompute": "full"}, 1e-4),
        ({"precision": "bf16"}, BF16_BUFFER_TOLERANCE),
    ]
    found = run_ranks(f"{WORKERS}:sum_and_inner_product", 1, [case for case, _ in cases])
    for (case, tolerance), [(total, inner, size)] in zip(cases, found, strict=True):
        assert abs(total - inner) < tolerance * size, case
