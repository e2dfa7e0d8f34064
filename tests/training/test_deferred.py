"""Weights over the global batch that are divided after the pass, against a softmax by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.launch import run_ranks

WORKERS = "tests.training.deferred_workers"
# float32 logits of size 1 to 10 are rounded by 1e-7 to 1e-6 of themselves, and so are weights.
TOLERANCE = 3e-6
# A step's losses and norms are sums of thousands of terms of another order.
LAYOUT_TOLERANCE = 2e-5

DOCUMENTS = {"border_loss": False, "uncounted": 0.2}
CASES: list[tuple[int, dict[str, Any]]] = [
    *((1, {"micro_batch": size}) for size in (1, 2, 4, 8)),
    (1, {"micro_batch": 1, "floor": 0.3}),
    (1, {"micro_batch": 2, "bound": 0.0}),
    (1, {"micro_batch": 2, "bound": 0.95, "floor": 0.1}),
    (1, {"micro_batch": 1, "documents": DOCUMENTS}),
    (1, {"micro_batch": 4, "documents": {"equal": True}, "floor": 0.1}),
    (2, {"micro_batch": 1}),
    (2, {"micro_batch": 2, "documents": DOCUMENTS}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "micro_batch": 1}),
    (2, {"pipeline": 2, "virtual_stages": 2, "layers": 4, "documents": DOCUMENTS}),
    (2, {"sharded": True, "floor": 0.3}),
    (2, {"context": 2, "documents": DOCUMENTS}),
    (4, {"context": 2, "pipeline": 2, "micro_batch": 1}),
    (4, {"tensor": 2, "pipeline": 2, "micro_batch": 1}),
]


def _run(function: str, cases: list[tuple[int, dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    for size in sorted({size for size, _ in cases}):
        numbers = [number for number, (of_case, _) in enumerate(cases) if of_case == size]
        ranks = run_ranks(f"{WORKERS}:{function}", size, [cases[number][1] for number in numbers])
        for number, of_case in zip(numbers, ranks, strict=True):
            found[number] = of_case
    return found


def test_weights_are_the_softmax_over_the_batch_however_it_is_divided() -> None:
    for (_, case), ranks in zip(CASES, _run("weights_and_gradients", CASES), strict=True):
        for rank in ranks:
            assert rank["by hand"].std() > 0.05, "far from uniform"
            error = (rank["weights"].double() - rank["by hand"]).abs().max()
            assert error < TOLERANCE * rank["by hand"].max(), case
            assert rank["gradient error"] < TOLERANCE, case
            assert (rank["temperature"] > 1.0) == (case.get("bound") != 0.0), case


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {"micro_batch": 1}),
    (1, {"micro_batch": 8}),
    (2, {"tensor": 2, "sequence": True, "recompute": "full"}),
    (2, {"pipeline": 2, "micro_batch": 1}),
    (2, {"sharded": True, "micro_batch": 1}),
    (2, {"context": 2}),
]


@pytest.mark.parametrize("update", ["training", "ahead"])
def test_training_does_not_depend_on_micro_batches_and_layouts(update: str) -> None:
    cases = [(size, {"update": update, **case}) for size, case in [(1, {}), *LAYOUTS]]
    [[expected], *found] = _run("steps", cases)
    for case, ranks in zip(LAYOUTS, found, strict=True):
        for rank in ranks:
            for name, value in expected.items():
                torch.testing.assert_close(
                    rank[name],
                    value,
                    rtol=LAYOUT_TOLERANCE,
                    atol=1e-4,
                    msg=lambda m, c=case, n=name: f"{c} {n}: {m}",
                )
