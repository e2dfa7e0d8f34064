"""Weights from the LLM's own features: what is read, under every layout, and updates in a step."""

from __future__ import annotations

import pytest
import torch

from tests.launch import run_ranks
from tests.tiny import SAMPLES

WORKERS = "tests.training.feature_workers"
# Sums in another order: 1e-7 of a float32; losses and norms are sums of thousands of them. A
# gradient that vanishes in exact arithmetic is steps of AdamW's size in either direction, so phi is
# compared where its gradient is not noise, by what it does: the second step's weights.
TOLERANCE = 1e-4
EXACT_TOLERANCE = 2e-6

LAYOUTS = [
    ({"micro_batch": 2, "recompute": "full"}, 1),
    ({"tensor": 2}, 2),
    ({"tensor": 2, "sequence": True, "recompute": "full"}, 2),
    ({"pipeline": 2}, 2),
    ({"pipeline": 2, "virtual_stages": 2}, 2),
    ({"pipeline": 2, "recompute": "full"}, 2),
    ({}, 2),
    ({"sharded": True}, 2),
    ({"context": 2}, 2),
    ({"tensor": 2, "pipeline": 2, "sequence": True}, 4),
    ({"tensor": 2, "sharded": True}, 4),
    ({"context": 2, "pipeline": 2}, 4),
    ({"context": 2, "sharded": True}, 4),
    ({"tensor": 2, "context": 2, "sequence": True}, 4),
]
# Each group and each kind of update once under every layout.
MODES = [("micro_batch", "fresh"), ("global", "training")]


@pytest.fixture(scope="module")
def results() -> dict[tuple, dict[str, torch.Tensor]]:
    """(group, update_on, number of the layout) -> what the first rank found; -1 is one process."""
    found = {}
    for size in (1, 2, 4):
        keys, cases = [], []
        for number, (layout, world_size) in [(-1, ({}, 1)), *enumerate(LAYOUTS)]:
            if world_size == size:
                keys += [(*mode, number) for mode in MODES]
                cases += [
                    {"group": group, "update_on": on, "layers": 4, **layout} for group, on in MODES
                ]
        ranks = run_ranks(f"{WORKERS}:steps_and_updates", size, cases)
        for key, every_rank in zip(keys, ranks, strict=True):
            for rank in every_rank:
                assert torch.equal(rank["phi"], every_rank[0]["phi"]), "replicas drifted apart"
            found[key] = every_rank[0]
    return found


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
@pytest.mark.parametrize(("group", "update_on"), MODES)
def test_layouts_agree(results: dict, group: str, update_on: str, number: int) -> None:
    alone, other = results[group, update_on, -1], results[group, update_on, number]
    assert alone["first weights"].std() > 0.05, "weights are far from uniform"
    assert not torch.allclose(alone["first weights"], alone["second weights"], atol=1e-2)
    for name in ("first weights", "losses"):
        torch.testing.assert_close(other[name], alone[name], rtol=EXACT_TOLERANCE, atol=2e-5)
    for name in ("alignments", "gradient norms", "second weights"):
        scale = float(alone[name].abs().max())
        torch.testing.assert_close(other[name], alone[name], rtol=0, atol=TOLERANCE * scale)


def test_groups_differ(results: dict) -> None:
    per_micro_batch = results["micro_batch", "fresh", -1]["first weights"]
    over_all = results["global", "training", -1]["first weights"]
    torch.testing.assert_close(per_micro_batch.view(-1, 2).mean(1), torch.ones(SAMPLES // 2))
    torch.testing.assert_close(over_all.mean(), torch.ones([]))
    assert not torch.allclose(per_micro_batch, over_all, atol=1e-2)


def test_weighing_inside_a_pass_equals_reading_first() -> None:
    """One micro-batch is weighed inside the pass; several wait for a pass that reads them all."""
    cases = [
        {"group": "global", "update_on": on, "micro_batch": size}
        for on in ("fresh", "training")
        for size in (2, SAMPLES)
    ]
    [[first], [inside], [first_training], [inside_training]] = run_ranks(
        f"{WORKERS}:steps_and_updates", 1, cases
    )
    for one, other in ((first, inside), (first_training, inside_training)):
        for name in ("first weights", "second weights", "losses"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=2e-5)


def test_features_are_the_layers_outputs() -> None:
    cases = [{"early_layer": layer} for layer in (1, 3, 4)]
    for [pairs] in run_ranks(f"{WORKERS}:features_and_by_hand", 1, cases):
        for found, by_hand in pairs:
            torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-6)


LESSON_CASES = [
    ({}, 1),
    ({"precision": "bf16"}, 1),
    ({"clip": 0.2, "recompute": "full"}, 1),
    ({"pipeline": 2}, 2),
    ({"sharded": True, "precision": "bf16"}, 2),
    ({"tensor": 2, "sequence": True}, 2),
    ({"context": 2, "sharded": True}, 2),
]


def test_an_update_inside_a_step_leaves_the_step_as_it_is_and_sees_where_it_leads() -> None:
    """theta' is the parameters after the step, bit for bit, whatever happened in between."""
    for size in (1, 2):
        layouts = [case for case, world_size in LESSON_CASES if world_size == size]
        cases = [{"learns": learns, **case} for case in layouts for learns in (True, False)]
        found = run_ranks(f"{WORKERS}:state_after_step", size, cases)
        for case, learned, plain in zip(layouts, found[::2], found[1::2], strict=True):
            for (state, losses), (other, _) in zip(learned, plain, strict=True):
                pairs = zip(state, other, strict=True)
                assert all(torch.equal(one, two) for one, two in pairs), case
                # The same pass over the same parameters, added up in double precision; the pass
                # with gradients and the one without take the same kernels but in attention.
                assert abs(losses[0] - losses[1]) < 1e-6, case


def test_alignments_inside_a_step_are_those_at_the_state_before_it() -> None:
    for size in (1, 2):
        cases = [case for case, world_size in LESSON_CASES if world_size == size]
        for every_rank in run_ranks(f"{WORKERS}:inside_and_separate", size, cases):
            for inside, separate in every_rank:
                assert torch.equal(inside, separate)


def test_halves_agree_on_documents_that_count() -> None:
    [[found]], ranks = (run_ranks(f"{WORKERS}:agreement_of_halves", size, [{}]) for size in (1, 2))
    for agreement, by_hand in [found, *ranks[0]]:
        assert agreement == pytest.approx(by_hand, abs=1e-9)
        assert agreement == pytest.approx(found[0], abs=1e-4)
