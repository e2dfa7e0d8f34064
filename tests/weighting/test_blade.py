"""BLADE's reference: its copy, its objective by autograd, and its steps in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.launch import run_ranks

WORKERS = "tests.weighting.blade_workers:"
UNITS = ("sample", "document", "token")
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    (2, {}),
    (2, {"sharded": True}),
]


def test_the_gradient_is_autograds() -> None:
    for [[ours, expected]] in run_ranks(
        WORKERS + "gradient_and_autograds", 1, [{"unit": unit} for unit in UNITS]
    ):
        assert float((ours - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("worker", ["copied", "copied_in_bf16"])
@pytest.mark.parametrize(("size", "layout"), [(1, {}), *LAYOUTS], ids=str)
def test_the_reference_is_a_copy_of_the_llm(size: int, layout: dict[str, Any], worker: str) -> None:
    [ranks] = run_ranks(WORKERS + worker, size, [layout])
    for llm, reference in ranks:
        for parameter, other in zip(llm, reference, strict=True):
            assert torch.equal(parameter, other)


def test_updates_of_an_earlier_method_do_not_move_the_copy() -> None:
    cases = [{"unit": "sample", "before": before} for before in (0, 57)]
    [[first], [later]] = run_ranks(WORKERS + "updates", 1, cases)
    assert torch.equal(first["values"], later["values"])


@pytest.mark.parametrize(("size", "layout"), LAYOUTS, ids=str)
def test_layouts_train_the_same_reference(size: int, layout: dict[str, Any]) -> None:
    alone = run_ranks(WORKERS + "updates", 1, [{"unit": unit} for unit in UNITS])
    split = run_ranks(WORKERS + "updates", size, [{"unit": unit, **layout} for unit in UNITS])
    for [expected], ranks in zip(alone, split, strict=True):
        for found in ranks:
            # Adam turns the rounding of a gradient near 0 into a step of another size.
            torch.testing.assert_close(found["values"], expected["values"], rtol=1e-4, atol=0.0)
        if size == 2 and not ("tensor" in layout or "pipeline" in layout):
            continue  # replicas hold parts of the weights
        assert torch.equal(ranks[0]["weights"] > 0, expected["weights"] > 0)
