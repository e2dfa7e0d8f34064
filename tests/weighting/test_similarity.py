"""Weights by similarity against Hugging Face's hidden states, and under every layout."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import torch

from megatron_dwm.config import Config, PolicyConfig, UserError, ValidationConfig, WeightingConfig
from megatron_dwm.convert.to_hf import export_to_huggingface
from megatron_dwm.weighting import check_method
from tests.launch import run_ranks
from tests.small_runs.command import metrics, succeed
from tests.small_runs.fixtures import Corpus

WORKERS = "tests.weighting.similarity_workers"
STEPS = 5
SIMILARITY = [
    *("--policy.name", "similarity", "--policy.similarity_temperature", "0.02"),
    *("--training.checkpoint_interval_steps", str(STEPS), "--training.steps", str(STEPS + 2)),
    *("--logging.weights_interval_steps", "1", "--weighting.warmup_steps", str(STEPS)),
]
RUNS = {
    "samples": ["--model.num_layers", "3", "--policy.similarity_layer", "2"],
    "last words": ["--validation.loss_on", "last_word", "--validation.batch_size", "5"],
    "documents": ["--weighting.unit", "document"],
}
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


@pytest.mark.parametrize("name", RUNS)
def test_weights_are_those_of_transformers_hidden_states(
    corpus: Corpus, tmp_path: Path, name: str
) -> None:
    """A run reads the target after five steps; the model of that checkpoint is exported."""
    run_dir = tmp_path / "run"
    succeed(run_dir, *corpus.arguments(), *SIMILARITY, *RUNS[name])
    exported = tmp_path / "exported"
    export_to_huggingface(run_dir / f"checkpoints/step_{STEPS:08}", exported)
    case = {"run_dir": str(run_dir), "exported": str(exported), "step": STEPS}
    [[by_hand]] = run_ranks(f"{WORKERS}:weights_from_transformers", 1, [case])
    rows = ds.dataset(run_dir / "weights").to_table().to_pylist()
    assert {row["weight"] for row in rows if row["step"] <= STEPS} == {1.0}
    found = torch.tensor([row["weight"] for row in rows if row["step"] == STEPS + 1])
    assert float(found.std()) > 0.05, "the weights are far from uniform"
    # fp32 hidden states against double precision, divided by the temperature.
    torch.testing.assert_close(found.double(), by_hand, rtol=0, atol=2e-4)
    [line] = metrics(run_dir, "weighting")
    assert line["step"] == STEPS and line["update"] == 1


def test_layouts_agree() -> None:
    for case, [alone] in zip(CASES, run_ranks(f"{WORKERS}:steps", 1, CASES), strict=True):
        assert float(alone["weights"].std()) > 0.05, "the weights are far from uniform"
        for size in (2, 4):
            layouts = [layout for layout, ranks in LAYOUTS if ranks == size]
            cases = [{**case, **layout} for layout in layouts]
            for layout, ranks in zip(
                layouts, run_ranks(f"{WORKERS}:steps", size, cases), strict=True
            ):
                for found in ranks:
                    for name, tolerance in (("weights", 1e-4), ("losses", 1e-5)):
                        difference = (found[name] - alone[name]).abs().max()
                        assert float(difference) < tolerance, (case, layout, name)


DEFERRED: list[tuple[int, dict[str, Any]]] = [
    (1, {"unit": "sample", "micro_batch": 1}),
    (1, {"unit": "document", "micro_batch": 2}),
    (1, {"unit": "document", "bound": 0.9}),
    (2, {"unit": "sample", "pipeline": 2}),
    (2, {"unit": "document", "micro_batch": 1}),
    (2, {"unit": "sample", "bound": 0.0, "tensor": 2, "sequence": True}),
]


@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_of_any_micro_batches_is_weighed_over_all_of_it(size: int) -> None:
    cases = [case for ranks, case in DEFERRED if ranks == size]
    for case, ranks in zip(cases, run_ranks(f"{WORKERS}:deferred", size, cases), strict=True):
        for found in ranks:
            assert float(found["by hand"].std()) > 0.05, "far from uniform"
            assert (float(found["temperature"]) > 1.0) == (case.get("bound") != 0.0), case
            # Cosines in fp32 have errors of 1e-7, divided by TEMPERATURE.
            error = (found["weights"].double() - found["by hand"]).abs().max()
            assert float(error) < 5e-5, case


def test_a_reading_records_the_passages_loss() -> None:
    [[(found, by_hand)]] = run_ranks(f"{WORKERS}:validation_loss", 1, [{}])
    assert found == pytest.approx(by_hand, abs=1e-5)


def test_a_reading_that_is_not_finite_is_left_out() -> None:
    [[found]] = run_ranks(f"{WORKERS}:not_finite", 1, [{}])
    assert found == (True, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"validation": ValidationConfig()}, "validation.path: policy similarity needs"),
        ({"weighting": WeightingConfig()}, "weighting.mode staged: policy similarity"),
        (
            {"policy": PolicyConfig(name="similarity", similarity_layer=5)},
            "policy.similarity_layer 5: expected 1 to the LLM's number of layers, 4",
        ),
        ({}, ""),
    ],
)
def test_what_it_needs_is_asked_for(change: dict[str, Any], words: str) -> None:
    sections: dict[str, Any] = {
        "validation": ValidationConfig(path="v"),
        "policy": PolicyConfig(name="similarity"),
        "weighting": WeightingConfig(mode="online"),
        **change,
    }
    with pytest.raises(UserError, match=f"^{words}") if words else nullcontext():
        check_method(Config(**sections), 4, 1)
