"""The hypergradient against autograd in double precision, and between layouts."""

from __future__ import annotations

import pytest
import torch

from tests.launch import run_ranks

# fp32 sums of a few thousand terms, each of relative error 6e-8, with cancellation.
ORACLE_TOLERANCE = 1e-5
# For models in which nothing amplifies rounding. Adam amplifies it, by the square root of a second
# moment near zero: then the tolerance is the effect of rounding in one process (`rounding_errors`).
LAYOUT_TOLERANCE = 1e-6
ROUNDING_SEEDS = (1, 2, 3, 4)

# Norms of heads with heads of another width, and a bias on queries, keys and values.
QWEN3 = {"qk_layernorm": True, "kv_channels": 12}
QWEN2 = {"add_qkv_bias": True}

ORACLE_CASES = [
    {"inner": "adam", "clip": 1.0},
    {"inner": "adam", "clip": 0.2, "tied": False},
    {"inner": "adam", "clip": 0.0, "query_groups": 4},
    {"inner": "sgd", "clip": 0.2},
    {"inner": "sgd", "clip": 0.0, "tied": False, "query_groups": 1},
    {"inner": "adam", "clip": 0.2, **QWEN3},
    {"inner": "sgd", "clip": 0.0, **QWEN2},
]

LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "sequence": True, "tied": False},
    {"pipeline": 2},
    {"pipeline": 2, "tied": False, "recompute": "full"},
    {},
    {"sharded": True},
    {"sharded": True, "clip": 0.2},
    {"tensor": 2, "sequence": True, "clip": 0.2, "recompute": "full"},
    {"pipeline": 2, "clip": 0.2},
    {"pipeline": 2, "virtual_stages": 2, "layers": 4},
    {"pipeline": 2, "virtual_stages": 2, "layers": 4, "recompute": "full", "tied": False},
    {"tensor": 2, "recompute": "selective"},
    {"context": 2},
    {"context": 2, "sharded": True, "clip": 0.2},
    {"context": 2, "recompute": "full", "tied": False},
    {"context": 2, "recompute": "selective"},
    *(
        {**layout, **model}
        for model in (QWEN3, QWEN2)
        for layout in (
            {"tensor": 2},
            {"tensor": 2, "sequence": True, "clip": 0.2},
            {"tensor": 2, "recompute": "full"},
            {"pipeline": 2},
            {"sharded": True, "clip": 0.2},
            {"context": 2},
        )
    ),
]
LAYOUTS_OF_FOUR = [
    {"tensor": 2, "pipeline": 2, "sequence": True},
    {"tensor": 2, "sharded": True, "clip": 0.2},
    {"context": 4},
    {"context": 2, "sharded": True},
    {"tensor": 2, "context": 2},
    {"tensor": 2, "context": 2, "sequence": True, "clip": 0.2, "tied": False},
    {"context": 2, "pipeline": 2, "sharded": True},
    {"context": 2, "pipeline": 2, "virtual_stages": 2, "layers": 4, "recompute": "full"},
    {"tensor": 2, "sharded": True, **QWEN3},
    {"tensor": 2, "pipeline": 2, "sequence": True, **QWEN2},
]


MODEL_KEYS = ("clip", "tied", "query_groups", "layers", *QWEN3, *QWEN2)
BF16_LAYOUTS = [({"precision": "bf16"}, 1), ({"precision": "bf16", "sharded": True}, 2)]
ALL_LAYOUTS = (
    [(layout, 2) for layout in LAYOUTS] + [(layout, 4) for layout in LAYOUTS_OF_FOUR] + BF16_LAYOUTS
)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def _alone(layout: dict) -> dict:
    """Returns the keys of the same model in one process and in fp32."""
    return {key: value for key, value in layout.items() if key in MODEL_KEYS}


@pytest.fixture(scope="module")
def alignments() -> dict[str, list[torch.Tensor]]:
    """Alignments on every rank, by case; a case is the layout and its number of processes."""
    cases = ALL_LAYOUTS + [(_alone(layout), 1) for layout, _ in ALL_LAYOUTS]
    found = {}
    for size in (1, 2, 4):
        mine = [layout for layout, world_size in cases if world_size == size]
        results = run_ranks("tests.bilevel.workers:alignments", size, mine)
        found.update({f"{case} {size}": ranks for case, ranks in zip(mine, results, strict=True)})
    return found


@pytest.fixture(scope="module")
def rounding_errors(alignments: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Largest relative change of the alignments in one process, by model, from rounding alone.

    The parameters that training starts from are rounded in another way. The sums of a layout differ
    from those of one process by rounding, so the alignments may differ by this much.
    """
    models = {str(_alone(layout)): _alone(layout) for layout, _ in ALL_LAYOUTS}
    cases = [
        {**model, "rounding_seed": seed} for model in models.values() for seed in ROUNDING_SEEDS
    ]
    found = [rank for [rank] in run_ranks("tests.bilevel.workers:alignments", 1, cases)]
    errors = {}
    for place, name in enumerate(models):
        of_model = found[place * len(ROUNDING_SEEDS) : (place + 1) * len(ROUNDING_SEEDS)]
        [expected] = alignments[f"{name} 1"]
        errors[name] = max(_relative(rounded, expected) for rounded in of_model)
    return errors


@pytest.fixture(scope="module")
def oracles() -> list[tuple[torch.Tensor, torch.Tensor]]:
    results = run_ranks("tests.bilevel.workers:alignments_and_oracle", 1, ORACLE_CASES)
    return [rank for [rank] in results]


@pytest.mark.parametrize("number", range(len(ORACLE_CASES)), ids=lambda n: str(ORACLE_CASES[n]))
def test_equals_autograd_through_the_step_in_double_precision(
    oracles: list[tuple[torch.Tensor, torch.Tensor]], number: int
) -> None:
    ours, oracle = oracles[number]
    assert oracle.abs().max() > 0
    assert _relative(ours, oracle) < ORACLE_TOLERANCE


@pytest.mark.parametrize(("layout", "world_size"), ALL_LAYOUTS, ids=str)
def test_layouts_agree(
    alignments: dict[str, list[torch.Tensor]],
    rounding_errors: dict[str, float],
    layout: dict,
    world_size: int,
) -> None:
    [expected] = alignments[f"{_alone(layout)} 1"]
    # A layout rounds every product and sum, and the trials round once: allow 4 times theirs.
    tolerance = max(LAYOUT_TOLERANCE, 4 * rounding_errors[str(_alone(layout))])
    assert tolerance < ORACLE_TOLERANCE * 5, "rounding alone would hide a mistake"
    # bf16 has 8 bits: one rounding is 4e-3, and a chain of roundings is some tens of that.
    tolerance = 0.1 if layout.get("precision") == "bf16" else tolerance
    for found in alignments[f"{layout} {world_size}"]:
        assert _relative(found, expected) < tolerance


def test_forward_is_unchanged_and_hooks_are_removed() -> None:
    assert run_ranks("tests.bilevel.workers:forward_values_unchanged", 1, [{}]) == [[True]]


ESTIMATOR_CASES = [
    {"inner": "adam", "clip": 1.0},
    {"inner": "adam", "clip": 0.2, "tied": False, "query_groups": 4},
    {"inner": "sgd", "clip": 0.2},
    {"inner": "sgd", "clip": 0.0, "query_groups": 1},
    {"inner": "sgd", "clip": 0.2, **QWEN3},
    {"inner": "adam", "clip": 1.0, **QWEN2},
]


@pytest.fixture(scope="module")
def estimators() -> list[tuple[torch.Tensor, ...]]:
    results = run_ranks("tests.bilevel.workers:unroll_and_probe", 1, ESTIMATOR_CASES)
    return [rank for [rank] in results]


@pytest.mark.parametrize("number", range(len(ESTIMATOR_CASES)))
def test_estimators_agree(estimators: list[tuple[torch.Tensor, ...]], number: int) -> None:
    unrolled, probed, differenced = estimators[number]
    assert _relative(probed, unrolled) < ORACLE_TOLERANCE
    # A loss of 5.5 is rounded to 5e-7 and h*s is about 1e-3: an error of some 1e-3 remains
    # (METHOD.md, section 2: 3e-3).
    assert _relative(differenced, unrolled) < 5e-3


REFUSALS = [
    ({"estimator": "unroll", "precision": "bf16"}, 1, "fp32"),
    ({"estimator": "unroll", "recompute": "full"}, 1, "recompute"),
    ({"estimator": "finite_difference", "precision": "bf16"}, 1, "tangent_probe"),
    ({"estimator": "unroll", "halves": True}, 1, "signal-to-noise"),
    ({"estimator": "unroll", "tensor": 2}, 2, "one process"),
    ({"estimator": "unroll", "pipeline": 2}, 2, "one process"),
]


def test_estimators_refuse_what_they_cannot_do() -> None:
    for size in (1, 2):
        cases = [(case, word) for case, world_size, word in REFUSALS if world_size == size]
        found = run_ranks("tests.bilevel.workers:refused", size, [case for case, _ in cases])
        for (case, word), messages in zip(cases, found, strict=True):
            assert all(word in message for message in messages), (case, messages)


def test_halves_of_the_validation_batch_add_up() -> None:
    cases = [{}, {"clip": 0.2, "recompute": "full"}]
    # A half of four samples is two micro-batches; with training's micro-batch of four it were one.
    interleaved = [{"pipeline": 2, "virtual_stages": 2, "micro_batch": 4}]
    for size, these in ((1, cases), (2, cases), (2, interleaved)):
        for ranks in run_ranks("tests.bilevel.workers:halves_add_up", size, these):
            for found, whole in ranks:
                # Three numbers have the rounding of a layout: both halves' and the whole's.
                assert _relative(found, whole) < 3 * LAYOUT_TOLERANCE


def test_whole_chain_from_phi_to_validation_loss() -> None:
    cases = [
        {"inner": "adam"},
        {"inner": "adam", "clip": 0.2, "tied": False},
        {"inner": "sgd"},
        {"inner": "adam", "bound": 0.95},
        {"inner": "adam", "encoder": "llm"},
        {"inner": "sgd", "clip": 0.2, "encoder": "llm", "bound": 0.95},
    ]
    found = run_ranks("tests.bilevel.workers:chain_and_difference", 1, cases)
    for case, [(ours, expected)] in zip(cases, found, strict=True):
        # The central difference in double precision is exact to 1e-6 here. Ours has the 1e-5 of
        # fp32, and random directions cancel a part of the value.
        assert _relative(ours, expected) < 1e-4, case
