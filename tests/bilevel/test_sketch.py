"""Sketches of gradients: exact against autograd, unbiased, the same under every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Module

from megatron_dwm.bilevel.adapters import ADAPTERS, TORCH
from megatron_dwm.bilevel.sketch import Places, UnitSketches, count_sketch
from megatron_dwm.bilevel.unit_gradients import FORMS
from tests.bilevel.modules import (
    ALONE,
    DOCUMENTS,
    FUSED,
    NUMBERS_BS,
    TE,
    TE_NORM,
    WITH_BIAS,
    Case,
    Fused,
    Linear,
    Norm,
    case_of,
)
from tests.launch import run_ranks

WORKERS = "tests.bilevel.sketch_workers"
# fp32 sums of a few thousand terms, each of relative error 6e-8, with cancellation.
TOLERANCE = 1e-5
SIZE = 512
QWEN3 = {"qk_layernorm": True, "kv_channels": 12}
QWEN2 = {"add_qkv_bias": True}
MODEL_KEYS = ("tied", "query_groups", "layers", *QWEN3, *QWEN2)
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"tied": False, "query_groups": 4}),
    (1, {"units": "document"}),
    *(
        (ranks, {**layout, **model})
        for model in (QWEN3, QWEN2)
        for ranks, layout in (
            (1, {"units": "document", "weighed": True}),
            (2, {"tensor": 2}),
            (2, {"tensor": 2, "sequence": True, "units": "document"}),
            (2, {"pipeline": 2}),
        )
    ),
    (1, {"units": "document", "flattened": True, "weighed": True}),
    (1, {"recompute": "full", "weighed": True}),
    (1, {"recompute": "selective", "units": "document"}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence": True, "tied": False, "weighed": True}),
    (2, {"tensor": 2, "sequence": True, "units": "document", "recompute": "full"}),
    (2, {"pipeline": 2, "weighed": True}),
    (2, {"pipeline": 2, "tied": False, "units": "document"}),
    (2, {"pipeline": 2, "virtual_stages": 2, "layers": 4, "units": "document"}),
    (2, {"units": "document"}),
    (2, {"sharded": True}),
    (2, {"context": 2, "weighed": True}),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True, "units": "document", "weighed": True}),
    (4, {"tensor": 2, "context": 2, "sequence": True, "units": "document"}),
]


def _alone(layout: dict[str, Any]) -> dict[str, Any]:
    kept = (*MODEL_KEYS, "units", "weighed")
    return {key: value for key, value in layout.items() if key in kept}


def _run(function: str, cases: list[tuple[int, dict[str, Any]]]) -> list[list[Any]]:
    found: list[list[Any]] = [[] for _ in cases]
    for size in sorted({size for size, _ in cases}):
        numbers = [number for number, (of_case, _) in enumerate(cases) if of_case == size]
        ranks = run_ranks(f"{WORKERS}:{function}", size, [cases[number][1] for number in numbers])
        for number, of_case in zip(numbers, ranks, strict=True):
            found[number] = of_case
    return found


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest error of a Gram matrix's entry (i, j), relative to |g_i| |g_j|."""
    norms = expected.diag().sqrt()
    sizes = torch.outer(norms, norms)
    return float(((found - expected).abs() / sizes.where(sizes > 0, 1.0)).max())


def test_exact_sketches_have_autograds_inner_products() -> None:
    by_hand = _run("gram_by_hand", [(1, _alone(layout)) for _, layout in LAYOUTS])
    found = _run("sketches", [(size, {**layout, "size": 0}) for size, layout in LAYOUTS])
    for (_, layout), [expected], ranks in zip(LAYOUTS, by_hand, found, strict=True):
        assert float(expected.diag().max()) > 0
        for rank in ranks:
            sketch_nK = rank["sketches"].double()
            assert _error(sketch_nK @ sketch_nK.t(), expected) < TOLERANCE, layout
            assert rank["alignments are the probe's"], layout


def test_sketches_are_the_same_under_every_layout() -> None:
    alone = _run("sketches", [(1, {**_alone(layout), "size": SIZE}) for _, layout in LAYOUTS])
    found = _run("sketches", [(size, {**layout, "size": SIZE}) for size, layout in LAYOUTS])
    for (_, layout), [expected], ranks in zip(LAYOUTS, alone, found, strict=True):
        largest = float(expected["sketches"].abs().max())
        assert largest > 0
        for rank in ranks:
            difference = float((rank["sketches"] - expected["sketches"]).abs().max())
            assert difference < TOLERANCE * largest, layout


def test_products_with_z_are_the_probes_also_below_fp32() -> None:
    """In emulated FP8 with the layer's own rounded values; in bf16 each rounds its products."""
    cases: list[tuple[int, dict[str, Any], float]] = [
        (1, {"fp8_emulation": True}, 1e-4),
        (2, {"fp8_emulation": True, "tensor": 2, **QWEN2}, 1e-4),
        (1, {"fp8_emulation": True, **QWEN3}, 1e-4),
        (2, {"fp8_emulation": True, "pipeline": 2}, 1e-4),
        (2, {"fp8_emulation": True, "context": 2}, 1e-4),
        (1, {"precision": "bf16"}, 0.03),
    ]
    found = _run("along_z", [(size, case) for size, case, _ in cases])
    for (_, case, tolerance), ranks in zip(cases, found, strict=True):
        for product_n, alignment_n in ranks:
            largest = float(alignment_n.abs().max())
            assert float((product_n - alignment_n).abs().max()) < tolerance * largest, case


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"),
    [(FUSED, Fused), (TE_NORM, Norm), (TE + "TEColumnParallelLinear", Linear), *WITH_BIAS],
)
def test_classes_have_autograds_gradients(
    name: str, kind: Callable[[], Module], flat: bool
) -> None:
    case, units = case_of(kind), DOCUMENTS
    expected = _gradients_of_documents(case)
    gradient, kept = case.gradient_SBC, case.x_SBD
    if flat:  # one row, as Transformer Engine takes documents
        gradient, kept = (t.transpose(0, 1).flatten(0, 1)[:, None] for t in (gradient, kept))
        units = DOCUMENTS.flattened(NUMBERS_BS)
    places, first = {}, 0
    for parameter in case.module.parameters():
        numbers = torch.arange(first, first + parameter.numel()).view(parameter.shape)
        places[id(parameter)] = Places(numbers, torch.ones(parameter.shape))
        first += parameter.numel()
    sketches = UnitSketches(places, torch.zeros(units.count + 1, first))
    FORMS[name](case.module, {}, ALONE)(sketches, gradient, kept, units, 1)
    assert not sketches.values_nK[0].any(), "the units begin at row 1"
    # Sums are in fp32.
    torch.testing.assert_close(sketches.values_nK[1:].double(), expected, rtol=1e-5, atol=1e-5)


def test_learned_positions_have_autograds_gradients() -> None:
    torch.manual_seed(6)
    table = torch.nn.Embedding(7, 4)
    positions_BS = torch.arange(NUMBERS_BS.shape[1]).expand_as(NUMBERS_BS)
    gradient_BSD = torch.randn(*NUMBERS_BS.shape, 4)
    places = {id(table.weight): Places(torch.arange(28).view(7, 4), torch.ones(7, 4))}
    sketches = UnitSketches(places, torch.zeros(DOCUMENTS.count, 28))
    add = FORMS[TORCH + "sparse.Embedding"](table, {}, ALONE)
    add(sketches, gradient_BSD, positions_BS, DOCUMENTS, 0)
    for number in range(DOCUMENTS.count):
        loss = (table(positions_BS) * gradient_BSD)[number == NUMBERS_BS].sum()
        (expected,) = torch.autograd.grad(loss, table.weight)
        torch.testing.assert_close(sketches.values_nK[number], expected.flatten())


def _gradients_of_documents(case: Case) -> torch.Tensor:
    values_SBC = case.module(case.x_SBD) * case.gradient_SBC
    rows = []
    for number in range(DOCUMENTS.count):
        loss = values_SBC[(number == NUMBERS_BS).t()].sum()
        gradients = torch.autograd.grad(loss, list(case.module.parameters()), retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def test_inner_products_of_sketches_are_unbiased_and_have_the_stated_variance() -> None:
    seeds, size = 200, 64
    [[(found, exact)]] = run_ranks(f"{WORKERS}:over_seeds", 1, [{"size": size, "seeds": seeds}])
    squares = exact.diag()
    # The part of a bucket's own elements, which the formula subtracts, is left out: a bound.
    bound = (torch.outer(squares, squares) + exact.square()) / size
    errors = found - exact
    assert float((errors.mean(dim=0).abs() / (bound / seeds).sqrt()).max()) < 4.5
    # A variance from 200 trials has a deviation of 10 % for normal errors; these have longer tails.
    ratio = errors.square().mean(dim=0) / bound
    assert 0.6 < float(ratio.mean()) < 1.1, ratio
    assert float(ratio.max()) < 2.0, ratio


def test_buckets_and_signs_are_balanced() -> None:
    numbers, size = torch.arange(1 << 17), 256
    buckets, signs = count_sketch(numbers, size, seed=3)
    expected = len(numbers) / size
    chi_square = float(((buckets.bincount(minlength=size) - expected).square() / expected).sum())
    assert abs(chi_square - (size - 1)) < 5 * (2 * (size - 1)) ** 0.5
    assert abs(float(signs.sum())) < 5 * len(numbers) ** 0.5
    # Signs are independent of buckets, and neighbors of each other.
    sums = torch.zeros(size).index_add_(0, buckets, signs)
    assert abs(float(sums.square().mean() / expected) - 1.0) < 0.5
    assert abs(float((signs[1:] * signs[:-1]).sum())) < 5 * len(numbers) ** 0.5
    others, _ = count_sketch(numbers, size, seed=4)
    assert abs(float((others == buckets).float().mean()) - 1 / size) < 5e-3


def test_every_class_with_a_tangent_has_a_sketch() -> None:
    assert FORMS.keys() == ADAPTERS.keys()


@pytest.mark.parametrize("size", [1, 7, 8192])
def test_buckets_are_in_range(size: int) -> None:
    buckets, signs = count_sketch(torch.arange(10_000) * 10**14, size, seed=0)
    assert int(buckets.min()) >= 0 and int(buckets.max()) < size
    assert set(signs.tolist()) == {-1.0, 1.0}
