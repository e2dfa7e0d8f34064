"""Tests for users with GPUs: bash tests/run.sh -m gpu. docs/gpu.md says which have run.

Tolerances: bf16 keeps 8 bits, e4m3 four and e5m2 three; alignments are sums with cancellation. So
values in low precision are held to fp32's by their correlation, not one by one.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch

from tests.gpu.workers import missing
from tests.launch import run_ranks

WORKERS = "tests.gpu.workers:"
RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]


def _runs(function: str, case: dict[str, Any], world_size: int = 1) -> list[Any]:
    """Returns the results of all ranks; skips if Transformer Engine cannot run the case."""
    precision = case["precision"]
    if precision != "fp32" and not case.get("fp8_emulation"):
        reason = missing(precision, case.get("fp8_recipe", "tensorwise"))
        if reason:
            pytest.skip(reason)
    return _ranks(function, json.dumps(case), world_size)


@functools.cache  # a process takes long to start, and several tests have the same reference
def _ranks(function: str, case: str, world_size: int) -> list[Any]:
    [ranks] = run_ranks(WORKERS + function, world_size, [json.loads(case)])
    return ranks


def _fp8(recipe: str) -> dict[str, Any]:
    return {"precision": "fp8", "fp8_recipe": recipe}


LOW = [{"precision": "bf16"}, *(_fp8(recipe) for recipe in RECIPES)]


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


@pytest.mark.gpu
@pytest.mark.parametrize("case", LOW, ids=str)
def test_transformer_engine_trains(case: dict[str, Any]) -> None:
    [found] = _runs("losses_while_training", case)
    [reference] = _runs("losses_while_training", {"precision": "fp32"})
    assert found["kind"] == "transformer_engine"
    assert found["losses"][-1] < found["losses"][0] - 0.1
    assert found["losses"][0] == pytest.approx(reference["losses"][0], abs=0.05)
    assert found["losses"][-1] == pytest.approx(reference["losses"][-1], abs=0.3)


@pytest.mark.gpu
def test_first_and_last_layer_can_stay_in_bf16() -> None:
    [found] = _runs("losses_while_training", {**_fp8("tensorwise"), "fp8_first_last_bf16": True})
    assert found["losses"][-1] < found["losses"][0] - 0.1


@pytest.mark.gpu
def test_probe_is_the_finite_difference_in_fp32() -> None:
    [probed] = _runs("alignments", {"precision": "fp32"})
    case = {"precision": "fp32", "estimator": "finite_difference"}
    [differenced] = _runs("alignments", case)
    assert float((probed - differenced).abs().max() / differenced.abs().max()) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("case", LOW, ids=str)
def test_probe_ranks_the_samples_as_fp32_does(case: dict[str, Any]) -> None:
    [found] = _runs("alignments", case)
    [exact] = _runs("alignments", {"precision": "fp32"})
    assert torch.isfinite(found).all()
    assert _correlation(found, exact) > (0.95 if case["precision"] == "bf16" else 0.8)


@pytest.mark.gpu
def test_emulated_fp8_is_near_transformer_engines() -> None:
    [found] = _runs("alignments", _fp8("tensorwise"))
    [emulated] = _runs("alignments", {"precision": "bf16", "fp8_emulation": True})
    assert _correlation(found, emulated) > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("case", LOW, ids=str)
def test_an_update_leaves_nothing_behind(case: dict[str, Any]) -> None:
    [parts] = _runs("left_behind", case)
    assert all(parts.values()), parts


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_quantized_weights_follow_the_virtual_step(recipe: str) -> None:
    [losses] = _runs("stale_weights", _fp8(recipe))
    assert losses["stepped"] != losses["before"]
    assert losses["after"] == pytest.approx(losses["before"], rel=1e-3)
    assert abs(losses["after"] - losses["before"]) < abs(losses["stepped"] - losses["before"])


@pytest.mark.gpu(2)
@pytest.mark.parametrize("case", LOW, ids=str)
def test_tensor_and_sequence_parallel(case: dict[str, Any]) -> None:
    [alone] = _runs("alignments", case)
    for found in _runs("alignments", {**case, "tensor": 2, "sequence": True}, world_size=2):
        assert _correlation(found, alone) > (0.95 if case["precision"] == "bf16" else 0.8)


@pytest.mark.gpu(4)
@pytest.mark.parametrize("case", [{"precision": "fp32"}, *LOW], ids=str)
def test_tensor_2_by_pipeline_2_over_nccl(case: dict[str, Any]) -> None:
    [alone] = _runs("alignments", case)
    ranks = _runs("alignments", {**case, "tensor": 2, "pipeline": 2}, world_size=4)
    for found in ranks:
        assert torch.equal(found, ranks[0])
    if case["precision"] == "fp32":  # TF32 is off unless it is asked for
        assert float((ranks[0] - alone).abs().max() / alone.abs().max()) < 1e-4
    else:
        assert _correlation(ranks[0], alone) > (0.95 if case["precision"] == "bf16" else 0.8)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("case", [{"precision": "fp32"}, *LOW], ids=str)
def test_parts_of_rows_over_nccl(case: dict[str, Any]) -> None:
    """Transformer Engine's attention passes keys and values around; the local one gathers them."""
    [alone] = _runs("alignments", case)
    for found in _runs("alignments", {**case, "context": 2}, world_size=2):
        if case["precision"] == "fp32":
            assert float((found - alone).abs().max() / alone.abs().max()) < 1e-4
        else:
            assert _correlation(found, alone) > (0.95 if case["precision"] == "bf16" else 0.8)


@pytest.mark.gpu
def test_groups_are_nccl() -> None:
    assert run_ranks(WORKERS + "backend", 1, [{}]) == [["nccl"]]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [{"precision": "fp32"}, *LOW], ids=str)
def test_memory_of_a_weighting_update(case: dict[str, Any]) -> None:
    """An update holds a copy of g, in fp32 one of theta too, and its steps' temporaries; a
    differentiated step would hold a second graph.
    """
    [found] = _runs("memory_of_an_update", case)
    assert found["update"] < 1.5 * found["plain"], found


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_stops_at_borders(precision: str) -> None:
    """Transformer Engine once ignored the borders of documents without an error."""
    [(stops, finding)] = _runs("borders", {"precision": precision})
    assert stops, finding


@pytest.mark.gpu(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_stops_at_borders_across_parts(precision: str) -> None:
    case = {"precision": precision, "context": 2}
    for stops, finding in _runs("borders", case, world_size=2):
        assert stops, finding
