"""Weights from the batch's own alignments against double precision, and under every layout."""

from __future__ import annotations

from itertools import product

import torch

from tests.launch import run_ranks
from tests.weighting.alignment_workers import BOUND, TEMPERATURE
from tests.weighting.unit_workers import softmax_by_hand

WORKERS = "tests.weighting.alignment_workers"
LAYOUTS = [
    ({"tensor": 2, "sequence": True}, 2),
    ({"pipeline": 2}, 2),
    ({}, 2),
    ({"sharded": True}, 2),
    ({"tensor": 2, "pipeline": 2}, 4),
]
CASES = [
    {"unit": unit, "group": group}
    for unit, group in product(("sample", "document"), ("micro_batch", "global"))
]


def test_weights_are_those_of_the_oracles_alignments() -> None:
    cases = [
        {"group": "global", "inner": "adam"},
        {"group": "global", "inner": "sgd"},
        {"group": "global", "inner": "adam", "clip": 0.2},
        {"group": "micro_batch", "inner": "adam"},
    ]
    for [found] in run_ranks(f"{WORKERS}:weights_and_oracle", 1, cases):
        assert float(found["by hand"].std()) > 0.3, "the weights are far from uniform"
        # fp32 alignments have a relative error of 1e-5 (tests/bilevel).
        torch.testing.assert_close(found["ours"].double(), found["by hand"], rtol=0, atol=5e-4)


def test_layouts_agree() -> None:
    """And in each, alignments are bit for bit those of the estimator at uniform weights."""
    for case, [alone] in zip(CASES, run_ranks(f"{WORKERS}:steps", 1, CASES), strict=True):
        assert float(alone["weights"].std()) > 0.3, "the weights are far from uniform"
        for size in (2, 4):
            layouts = [layout for layout, ranks in LAYOUTS if ranks == size]
            cases = [{**case, **layout} for layout in layouts]
            results = run_ranks(f"{WORKERS}:steps", size, cases)
            for layout, ranks in zip(layouts, results, strict=True):
                for found in ranks:
                    for name, of_all in alone.items():
                        # Rounding is 1e-4 of the largest alignment (tests/training).
                        tolerance = 3e-4 * float(of_all.abs().max())
                        difference = float((found[name] - of_all).abs().max())
                        assert difference < tolerance, (case, layout, name)


CHOICES = [
    {"inner": "adam", "redundancy": 1.0},
    {"inner": "adam", "redundancy": 10.0, "clip": 0.2},
    {"inner": "sgd", "redundancy": 1.0, "clip": 0.0},
    {"inner": "sgd", "redundancy": 1000.0},
]


def test_greedy_choices_are_those_of_a_plain_loop_over_autograds_gradients() -> None:
    changed = 0
    for case, [found] in zip(
        CHOICES, run_ranks(f"{WORKERS}:choice_and_oracle", 1, CHOICES), strict=True
    ):
        assert found["gap"] > 1e-3, (case, "rounding could change a choice", found["gap"])
        assert torch.equal(found["ours"], found["by hand"]), case
        changed += not torch.equal(found["by hand"], found["without overlaps"])
    assert changed >= 2, "overlaps change what is chosen"


def test_greedy_choices_agree_between_layouts() -> None:
    cases = [
        {**case, "sketch_size": size} for case, size in zip(CASES, (0, 8192, 8192, 0), strict=True)
    ]
    for case, [alone] in zip(cases, run_ranks(f"{WORKERS}:choices", 1, cases), strict=True):
        assert {0.0} < set(alone["weights"].tolist())
        for size in (2, 4):
            layouts = [layout for layout, ranks in LAYOUTS if ranks == size]
            results = run_ranks(f"{WORKERS}:choices", size, [{**case, **x} for x in layouts])
            for layout, ranks in zip(layouts, results, strict=True):
                for found in ranks:
                    assert torch.equal(found["weights"], alone["weights"]), (case, layout)


def test_running_moments_are_those_by_hand() -> None:
    """Of units in proportion to their size, over saving and loading; and replicas agree."""
    decay = 0.6
    cases = [{**case, "decay": decay} for case in CASES if case["group"] == "global"]
    two = run_ranks(f"{WORKERS}:running", 2, cases)
    for case, [alone], ranks in zip(
        cases, run_ranks(f"{WORKERS}:running", 1, cases), two, strict=True
    ):
        moments = None
        for step, found in enumerate(alone):
            s, sizes = found["alignments"].double(), found["sizes"].double()
            now = torch.stack([(sizes * v).sum() / sizes.sum() for v in (s, s.square())])
            moments = now if moments is None else decay * moments + (1 - decay) * now
            torch.testing.assert_close(torch.tensor(found["moments"]).double(), moments)
            deviation = (moments[1] - moments[0] ** 2).sqrt()
            by_hand = softmax_by_hand((s - moments[0]) / deviation / TEMPERATURE, sizes, BOUND)
            torch.testing.assert_close(found["weights"].double(), by_hand, rtol=0, atol=1e-5)
            for rank in ranks:
                difference = float((rank[step]["weights"] - found["weights"]).abs().max())
                assert difference < 3e-3, (case, step)


def test_a_high_temperature_is_plain_training() -> None:
    cases = [{"temperature": temperature} for temperature in (1e6, 1.0, None)]
    [[hot], [warm], [plain]] = run_ranks(f"{WORKERS}:parameters_after_a_step", 1, cases)
    assert torch.equal(plain[0], torch.ones_like(plain[0]))
    assert float((hot[0] - 1.0).abs().max()) < 1e-5 < 0.3 < float(warm[0].std())
    assert float((hot[1] - plain[1]).abs().max()) < 1e-6 < float((warm[1] - plain[1]).abs().max())
