"""Uniform weights are plain Megatron-Core training, bit for bit; weights act as numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.launch import run_ranks

LAYOUTS = [
    ({}, 1),
    ({"precision": "bf16"}, 1),
    ({"clip": 0.0, "tied": False}, 1),
    ({}, 2),
    ({"sharded": True}, 2),
    ({"tensor": 2, "sequence": True}, 2),
    ({"pipeline": 2}, 2),
    ({"context": 2}, 2),
    ({"context": 2, "sharded": True}, 2),
    ({"sharded": True, "precision": "bf16"}, 2),
    ({"pipeline": 2, "virtual_stages": 2, "layers": 4}, 2),
    ({"tensor": 2, "pipeline": 2}, 4),
    ({"pipeline": 2, "sharded": True, "precision": "bf16"}, 4),
]
# Documents as units, or rows of them, behind borders of the attention.
WITHOUT, WITH = ({"border_loss": border_loss} for border_loss in (False, True))
LAYOUTS += [
    ({"documents": WITHOUT}, 1),
    ({"documents": WITH, "precision": "bf16"}, 1),
    ({"documents": {**WITH, "unit": "sample"}}, 1),
    ({"documents": WITHOUT, "tensor": 2, "sequence": True}, 2),
    ({"documents": WITH, "tensor": 2}, 2),
    ({"documents": WITHOUT, "pipeline": 2}, 2),
    ({"documents": WITH, "pipeline": 2, "recompute": "full"}, 2),
    ({"documents": WITHOUT}, 2),
    ({"documents": WITH, "sharded": True}, 2),
    ({"documents": WITH, "context": 2}, 2),
]


@pytest.fixture(scope="module")
def runs() -> dict[str, list]:
    """function and layout -> what every rank found."""
    found = {}
    for size in (1, 2, 4):
        cases = [layout for layout, world_size in LAYOUTS if world_size == size]
        for function in ("plain_megatron", "ours_uniform"):
            results = run_ranks(f"tests.training.workers:{function}", size, cases)
            found.update({f"{function} {c} {size}": r for c, r in zip(cases, results, strict=True)})
    return found


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS, ids=str)
def test_uniform_weights_train_bit_for_bit_as_megatron(
    runs: dict[str, list], layout: dict, world_size: int
) -> None:
    plain = runs[f"plain_megatron {layout} {world_size}"]
    ours = runs[f"ours_uniform {layout} {world_size}"]
    for (_, parameters), (our_losses, our_parameters) in zip(plain, ours, strict=True):
        assert torch.equal(parameters, our_parameters)
        # Only the last stage of plain Megatron knows its loss. It adds the tokens of a micro-batch
        # at once, ours a sample at a time: the parameters above are the exact test.
        torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(plain[-1][0]))


@pytest.fixture(scope="module")
def gradients() -> list[torch.Tensor]:
    weights = [[1.0] * 8, [1 / 64] * 8, [0.0, 1.0] * 4, [2.0, 0.0] * 4]
    cases = [{"weights": w} for w in weights]
    return [g for [g] in run_ranks("tests.training.workers:gradient_of_weights", 1, cases)]


def test_weights_of_one_64th_scale_the_gradient_exactly(gradients: list[torch.Tensor]) -> None:
    ones, small, *_ = gradients
    assert torch.equal(small * 64, ones)


@pytest.mark.parametrize(
    ("layout", "ranks"), [({"tensor": 2, "pipeline": 2}, 4), ({"sharded": True}, 2)], ids=str
)
def test_they_do_in_other_layouts(layout: dict[str, Any], ranks: int) -> None:
    cases = [{"weights": [weight] * 8, **layout} for weight in (1.0, 1 / 64)]
    ones, small = run_ranks("tests.training.workers:gradient_of_weights", ranks, cases)
    for one, other in zip(ones, small, strict=True):
        assert one.abs().max() > 0 and torch.equal(other * 64, one)


def test_zero_and_one_weights_drop_samples(gradients: list[torch.Tensor]) -> None:
    [[dropped]] = run_ranks(
        "tests.training.workers:gradient_without", 1, [{"dropped": [0, 2, 4, 6]}]
    )
    difference = (gradients[2] - dropped).norm() / dropped.norm()
    assert difference < 1e-6  # fp32 sums in another order


def test_weights_split_over_replicas_as_over_one(gradients: list[torch.Tensor]) -> None:
    case = {"weights": [2.0, 0.0] * 4}
    [ranks] = run_ranks("tests.training.workers:gradient_of_weights", 2, [case])
    for found in ranks:
        assert (found - gradients[3]).norm() / gradients[3].norm() < 1e-6


def test_losses_reach_every_stage() -> None:
    assert run_ranks("tests.training.workers:loss_is_finite_everywhere", 2, [{}]) == [[True, True]]
