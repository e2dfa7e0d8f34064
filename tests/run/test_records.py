"""What weights/*.parquet says of every sample: which of the numberings its id counts in."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.dataset as ds
import torch

from megatron_dwm.report.weight_stream import stream, weight_files
from tests.small_runs.command import metrics, succeed
from tests.small_runs.fixtures import Corpus

ROWS = 8
EVERY_STEP = ["--logging.weights_interval_steps", "1"]


def _recorded(run_dir: Path) -> list[dict]:
    return ds.dataset(run_dir / "weights").to_table().to_pylist()


def test_updates_and_steps_number_their_samples_apart(corpus: Corpus, tmp_path: Path) -> None:
    """Update 1 and step 2 both have samples 8 to 15, and both are recorded at step 2."""
    staged = ["--policy.name", "dwm", "--weighting.mode", "staged", "--weighting.stages", "3"]
    staged += ["--weighting.updates_per_stage", "2", "--training.steps", "7"]
    run_dir = tmp_path / "run"
    succeed(run_dir, *corpus.arguments(), *staged, *EVERY_STEP)
    rows = _recorded(run_dir)
    steps = [(s, "training", (s - 1) * ROWS + i) for s in range(1, 8) for i in range(ROWS)]
    updates = [line["step"] for line in metrics(run_dir, "weighting")]
    assert updates == [2, 2, 4, 4]
    fresh = [(s, "update", k * ROWS + i) for k, s in enumerate(updates) for i in range(ROWS)]
    found = sorted((row["step"], row["source"], row["sample_id"]) for row in rows)
    assert found == sorted(steps + fresh)
    assert len({(row["step"], row["sample_id"]) for row in rows}) < len(rows)
    assert all((row["alignment"] is not None) == (row["source"] == "update") for row in rows)
    assert _weights_read(run_dir) == sorted(row["weight"] for row in rows)


def test_updates_on_the_training_batch_keep_its_numbers(corpus: Corpus, tmp_path: Path) -> None:
    policy = ["--policy.name", "dwm", "--weighting.encoder", "llm"]
    policy += ["--weighting.update_on", "training", "--training.steps", "6"]
    succeed(tmp_path / "run", *corpus.arguments(), *policy, *EVERY_STEP)
    rows = _recorded(tmp_path / "run")
    assert {row["step"] for row in rows if row["alignment"] is not None} == {5}
    found = sorted((row["source"], row["sample_id"]) for row in rows)
    assert found == [("training", number) for number in range(6 * ROWS)]


def test_passages_of_the_target_have_numbers_of_their_own(corpus: Corpus, tmp_path: Path) -> None:
    mixing = ["--policy.name", "validation_mixing", "--policy.mix_fraction", "0.25"]
    succeed(tmp_path / "run", *corpus.arguments(), *mixing, *EVERY_STEP, "--training.steps", "3")
    rows = _recorded(tmp_path / "run")
    for step in (1, 2, 3):
        of_step = [row for row in rows if row["step"] == step]
        ids = sorted(row["sample_id"] for row in of_step if row["source"] == "training")
        assert ids == list(range((step - 1) * ROWS, (step - 1) * ROWS + 6))
        target = [row for row in of_step if row["source"] == "target"]
        assert len(target) == 2 and {row["domain"] for row in target} <= {"target", "unknown"}
    assert len(_weights_read(tmp_path / "run")) == 3 * ROWS


def _weights_read(run_dir: Path) -> list[float]:
    batches = stream(weight_files(run_dir), ["weight"])
    return sorted(value for batch in batches for value in batch["weight"].to_pylist())


def test_every_start_is_noted(corpus: Corpus, tmp_path: Path) -> None:
    run_dir, steps = tmp_path / "run", "--training.steps"
    succeed(run_dir, *corpus.arguments(), steps, "2")
    succeed(run_dir, *corpus.arguments(), steps, "3", "--run.resume", "true", processes=2)
    lines = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["processes"]) for line in lines] == [(0, 1), (2, 2)]
    for line in lines:
        assert line["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        assert {"megatron-core", "megatron-dwm", "python"} <= set(line["versions"])
        assert line["host"] and line["time"].endswith("+00:00") and line["command"]
