"""The virtual step is the real optimizer's step, bit for bit, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from megatron_dwm.bilevel.adam import AdamMoments, adam_jacobian, adam_step
from tests.launch import run_ranks

OVERLAPS = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = [
    ({}, 1),
    ({"clip": 0.2}, 1),
    ({"steps": 0}, 1),
    ({"precision": "bf16"}, 1),
    ({"sharded": True}, 2),
    ({"sharded": True, "precision": "bf16", "clip": 0.2}, 2),
    ({"tensor": 2, "sequence": True}, 2),
    ({"pipeline": 2, "precision": "bf16"}, 2),
    ({"context": 2, "sharded": True}, 2),
    ({"context": 2, "sharded": True, "precision": "bf16", "clip": 0.2}, 2),
    ({"sharded": True, "switches": {**OVERLAPS, "ddp_bucket_size": 2000}}, 2),
    ({"precision": "bf16", "clip": 0.2, "switches": {"grad_reduce_in_fp32": False}}, 1),
    (
        {
            "sharded": True,
            "precision": "bf16",
            "switches": {**OVERLAPS, "grad_reduce_in_fp32": False},
        },
        2,
    ),
]


NUMBERED = pytest.mark.parametrize(
    "number", range(len(LAYOUTS)), ids=lambda number: str(LAYOUTS[number])
)


def _of_every_layout(function: str) -> list[list]:
    """Results of LAYOUTS, in order; one start of processes for each world size."""
    results: dict[int, list] = {}
    for size in {world_size for _, world_size in LAYOUTS}:
        numbers = [number for number, (_, world_size) in enumerate(LAYOUTS) if world_size == size]
        cases = [LAYOUTS[number][0] for number in numbers]
        results.update(zip(numbers, run_ranks(function, size, cases), strict=True))
    return [results[number] for number in range(len(LAYOUTS))]


@pytest.fixture(scope="module")
def steps() -> list[list]:
    return _of_every_layout("tests.bilevel.workers:virtual_and_real")


@pytest.fixture(scope="module")
def restored() -> list[list]:
    return _of_every_layout("tests.bilevel.workers:everything_restored")


@NUMBERED
def test_virtual_step_is_the_real_step(steps: list[list], number: int) -> None:
    for pairs in steps[number]:
        assert pairs
        for virtual, real in pairs:
            assert torch.equal(virtual, real)


@NUMBERED
def test_everything_is_restored(restored: list[list], number: int) -> None:
    for parts in restored[number]:
        assert all(parts.values()), parts


def _moments(step: int, zero: bool = False) -> AdamMoments:
    generator = torch.Generator().manual_seed(step)
    first = torch.randn(64, generator=generator, dtype=torch.float64) * 1e-3
    second = torch.rand(64, generator=generator, dtype=torch.float64) * 1e-5
    if zero:
        first, second = torch.zeros_like(first), torch.zeros_like(second)
    return AdamMoments(first, second, step, 0.9, 0.95, 1e-8)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_jacobian_is_autograds(step: int) -> None:
    moments = _moments(step)
    gradient = torch.randn(64, dtype=torch.float64).mul_(1e-3).requires_grad_()
    m = moments.beta1 * moments.first + (1 - moments.beta1) * gradient
    v = moments.beta2 * moments.second + (1 - moments.beta2) * gradient**2
    t = step + 1
    u = (m / (1 - moments.beta1**t)) / ((v / (1 - moments.beta2**t)).sqrt() + moments.epsilon)
    (expected,) = torch.autograd.grad(u.sum(), gradient)
    torch.testing.assert_close(
        adam_jacobian(gradient.detach(), moments), expected, rtol=1e-10, atol=0
    )


def test_jacobian_of_untouched_parameters_is_finite_and_right() -> None:
    moments = _moments(0, zero=True)
    jacobian = adam_jacobian(torch.zeros(64, dtype=torch.float64), moments)
    h = 1e-14
    zero = torch.zeros(64, dtype=torch.float64)
    difference = adam_step(zero, zero - h, moments, 1.0) - adam_step(zero, zero + h, moments, 1.0)
    torch.testing.assert_close(jacobian, difference / (2 * h), rtol=1e-5, atol=0)


def test_the_gradients_norm_may_be_a_tensor() -> None:
    """As on GPUs, with kernels of Transformer Engine's and later releases of Megatron-Core."""
    [[found]] = run_ranks("tests.bilevel.workers:with_a_norm_in_a_tensor", 1, [{}])
    (alignments, norm), (of_tensor, norm_of_tensor) = found
    assert isinstance(norm_of_tensor, float) and norm > 0.2, "it is clipped"
    assert norm_of_tensor == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(of_tensor, alignments, rtol=1e-5, atol=1e-9)


def test_moments_are_only_read() -> None:
    moments = _moments(3)
    kept = moments.first.clone(), moments.second.clone()
    gradient = torch.randn(64, dtype=torch.float64)
    adam_step(torch.zeros(64, dtype=torch.float64), gradient, moments, 1.0)
    adam_jacobian(gradient, moments)
    assert torch.equal(moments.first, kept[0]) and torch.equal(moments.second, kept[1])
