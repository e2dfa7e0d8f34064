"""Alignments of Megatron-Core's own GPTModel, from its public spec, under every layout.

LayerNorm with a bias, torch's RMSNorm, learned positions, and biases in all linear layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.launch import run_ranks

WORKERS = "tests.bilevel.public_workers"
# fp32 sums of a few thousand terms, each of relative error 6e-8, with cancellation.
ORACLE_TOLERANCE = 1e-5
LAYOUT_TOLERANCE = 1e-6
ROUNDING_SEEDS = (1, 2, 3, 4)

GPT: dict[str, Any] = {}
GPT_WITH_HEAD_NORMS = {"qk_layernorm": True}
RMS = {"normalization": "RMSNorm", "positions": "rope", "bias": False, "qk_layernorm": True}
# Under sequence parallelism Megatron-Core refuses torch's norms.
OURS = {"normalization": "RMSNorm", "own_norms": True}
MODELS = {"gpt": GPT, "head norms": GPT_WITH_HEAD_NORMS, "rms": RMS, "our norms": OURS}
MODEL_KEYS = ("inner", "clip", *GPT_WITH_HEAD_NORMS, *RMS, *OURS)
SGD = {"inner": "sgd"}

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    *(
        (2, {**layout, **model, **SGD})
        for model in (GPT, GPT_WITH_HEAD_NORMS, RMS)
        for layout in ({"tensor": 2}, {"pipeline": 2}, {"sharded": True, "clip": 0.2})
    ),
    (2, {"tensor": 2, "sequence": True, **OURS, **SGD}),
    (2, {"tensor": 2, **OURS}),
    (2, {"tensor": 2, **GPT}),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True, **OURS, **SGD}),
]


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


def _alone(layout: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in layout.items() if key in MODEL_KEYS}


def test_the_spec_has_the_classes_that_are_tested() -> None:
    found = [rank for [rank] in run_ranks(f"{WORKERS}:probed_classes", 1, [GPT, RMS])]
    linear = {"ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"}
    assert found == [linear | {"LayerNorm", "Embedding"}, linear | {"RMSNorm"}]


def test_one_process_equals_autograd_in_double_precision() -> None:
    cases = [{**model, **inner} for model in MODELS.values() for inner in ({"clip": 0.2}, SGD)]
    found = run_ranks(f"{WORKERS}:alignments_and_oracle", 1, cases)
    for case, [(ours, oracle)] in zip(cases, found, strict=True):
        assert oracle.abs().max() > 0
        assert _relative(ours, oracle) < ORACLE_TOLERANCE, case


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[torch.Tensor, float]]:
    """Alignments in one process, and how much rounding alone changes them, by model."""
    models = {str(_alone(layout)): _alone(layout) for _, layout in LAYOUTS}
    cases = [
        {**model, "rounding_seed": seed}
        for model in models.values()
        for seed in (None, *ROUNDING_SEEDS)
    ]
    found = iter([rank for [rank] in run_ranks(f"{WORKERS}:alignments", 1, cases)])
    results = {}
    for name in models:
        exact = next(found)
        results[name] = exact, max(_relative(next(found), exact) for _ in ROUNDING_SEEDS)
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_layouts_agree(alone: dict[str, tuple[torch.Tensor, float]], size: int) -> None:
    layouts = [layout for world_size, layout in LAYOUTS if world_size == size]
    for layout, ranks in zip(
        layouts, run_ranks(f"{WORKERS}:alignments", size, layouts), strict=True
    ):
        expected, rounding = alone[str(_alone(layout))]
        # A layout rounds every product and sum, and the trials round once: allow 4 times theirs.
        tolerance = max(LAYOUT_TOLERANCE, 4 * rounding)
        assert tolerance < ORACLE_TOLERANCE * 5, "rounding alone would hide a mistake"
        for found in ranks:
            assert _relative(found, expected) < tolerance, layout
