"""OPUS: its scores in double precision, what it draws, and layouts."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dwm.weighting.opus import draw
from tests.launch import run_ranks

WORKERS = "tests.weighting.opus_workers"
# fp32 sums of a few thousand terms, each of relative error 6e-8, with cancellation.
TOLERANCE = 1e-5
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"tied": False}),
    (1, {"recompute": "full"}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "tied": False}),
    (2, {"pipeline": 2, "virtual_stages": 2, "layers": 4}),
    (2, {}),
    (2, {"sharded": True}),
    (4, {"tensor": 2, "pipeline": 2}),
]
MODEL_KEYS = ("tied", "layers")


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def _on_layouts(function: str, **arguments: Any) -> list[tuple[dict[str, Any], list[Any]]]:
    """Returns what all ranks found, by layout."""
    found = []
    for size in (1, 2, 4):
        layouts = [layout for of_size, layout in LAYOUTS if of_size == size]
        cases = [{**layout, **arguments} for layout in layouts]
        found += list(zip(layouts, run_ranks(f"{WORKERS}:{function}", size, cases), strict=True))
    return found


def _by_hand(tokens: int | None = None) -> dict[str, dict[str, Tensor]]:
    models = [{k: v for k, v in layout.items() if k in MODEL_KEYS} for _, layout in LAYOUTS]
    different = {str(model): model for model in models}
    cases = [{**model, "tokens": tokens} for model in different.values()]
    ranks = run_ranks(f"{WORKERS}:frozen_by_hand", 1, cases)
    return dict(zip(different, [rank for [rank] in ranks], strict=True))


def _expected(by_hand: dict[str, dict[str, Tensor]], layout: dict[str, Any]) -> dict[str, Tensor]:
    return by_hand[str({k: v for k, v in layout.items() if k in MODEL_KEYS})]


def test_frozen_scores_are_those_of_the_formula() -> None:
    by_hand = _by_hand()
    options = {"jacobian": "frozen", "sketch_size": 0}
    for layout, ranks in _on_layouts("scores", options=options):
        expected = _expected(by_hand, layout)
        for found in ranks:
            assert _relative(found[:, 0], expected["alignments"]) < 2 * TOLERANCE, layout
            rows = found[:, 1:].double()
            assert _relative(rows @ rows.t(), expected["overlaps"]) < 2 * TOLERANCE, layout


def test_scores_of_first_tokens_do_not_depend_on_the_rest() -> None:
    by_hand = _by_hand(tokens=6)
    for layout, ranks in _on_layouts("scores", options={"jacobian": "frozen", "tokens": 6}):
        expected = _expected(by_hand, layout)["alignments"]
        for found in ranks:
            assert found.shape == (len(expected), 1)
            assert _relative(found[:, 0], expected) < 2 * TOLERANCE, layout


def test_exact_scores_are_the_hypergradient_bit_for_bit() -> None:
    """And at temperature 0, without overlaps, its best candidates are chosen."""
    for layout, ranks in _on_layouts("exact_and_hypergradient"):
        for found, alignment, rows in ranks:
            assert torch.equal(found[:, 0], alignment), layout
            assert rows == sorted(alignment.argsort(descending=True)[: len(rows)].tolist())


def test_at_temperature_0_the_choice_is_that_of_a_plain_loop() -> None:
    by_hand = _by_hand()
    changed = False
    for redundancy, overlap_unit in ((0.3, "loss"), (3.0, "loss"), (0.7, "deviation")):
        options = {"selection_temperature": 0.0, "redundancy": redundancy, "sketch_size": 0}
        options["overlap_unit"] = overlap_unit
        for layout, ranks in _on_layouts("choice", step=7, options=options):
            expected = _expected(by_hand, layout)
            values, gram = expected["alignments"].clone(), redundancy * expected["overlaps"]
            if overlap_unit == "deviation":
                gram *= values.std(correction=0) / gram.diag().mean() * redundancy
            chosen: list[int] = []
            for _ in range(4):
                chosen.append(int(values.argmax()))
                values = values - gram[chosen[-1]]
                values[chosen] = -torch.inf
            assert all(rows == sorted(chosen) for rows in ranks), layout
            best = expected["alignments"].argsort(descending=True)[:4].tolist()
            changed |= sorted(best) != sorted(chosen)
    assert changed, "overlaps change what is chosen"


def test_layouts_draw_the_same_and_steps_draw_others() -> None:
    drawn = []
    for step in (0, 7, 8):  # step 0 draws at random
        on_layouts = _on_layouts("choice", step=step, options={})
        drawn.append(on_layouts[0][1][0])
        # Layouts of the same model: others have other alignments.
        same = [ranks for layout, ranks in on_layouts if not {"tied", "layers"} & layout.keys()]
        assert all(rows == drawn[-1] for ranks in same for rows in ranks), step
    assert len({tuple(rows) for rows in drawn}) > 1


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    """Ordered triples of five candidates, with overlaps, by chi-square."""
    values = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    temperature, trials = 0.7, 20_000
    for gram in (torch.zeros(5, 5, dtype=torch.float64), 0.4 * rows @ rows.t()):
        counts = dict.fromkeys(permutations(range(5), 3), 0)
        for _ in range(trials):
            drawn = draw(values, gram, 3, temperature=temperature, generator=generator)
            counts[tuple(drawn.tolist())] += 1
        expected = {
            order: trials * _probability(values, gram, order, temperature) for order in counts
        }
        # The statistic needs some draws in every cell; rare ones share a cell.
        rare = [order for order in counts if expected[order] < 10]
        pairs = [(counts[order], expected[order]) for order in counts if order not in rare]
        pairs.append((sum(counts[order] for order in rare), sum(expected[o] for o in rare) + 1e-9))
        chi_square = sum((count - wanted) ** 2 / wanted for count, wanted in pairs)
        assert sum(wanted for _, wanted in pairs) == pytest.approx(trials)
        # Mean n and variance 2 n with n + 1 cells.
        assert chi_square < len(pairs) - 1 + 5 * (2 * (len(pairs) - 1)) ** 0.5


def _probability(values: Tensor, gram: Tensor, order: tuple[int, ...], temperature: float) -> float:
    scale, probability = temperature * float(values.std(correction=0)), 1.0
    for place, number in enumerate(order):
        left = [i for i in range(len(values)) if i not in order[:place]]
        now = values - gram[list(order[:place])].sum(dim=0)
        shares = (now[left] / scale).softmax(0)
        probability *= float(shares[left.index(number)])
    return probability


def test_equal_scores_are_drawn_at_random_and_at_temperature_0_in_order() -> None:
    zeros, gram = torch.zeros(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        draw(zeros, gram, 2, temperature=0.9, generator=generator).tolist() for _ in range(600)
    ]
    counts = torch.tensor(drawn).flatten().bincount(minlength=6)
    assert float((counts - 200).abs().max()) < 5 * 200**0.5
    first = draw(zeros, gram, 3, temperature=0.0, generator=generator)
    assert first.tolist() == [0, 1, 2]
