"""Runs that log to Weights & Biases, offline, read back from the files that it writes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from tests.small_runs.command import RESUME, metrics, pretrain, succeed
from tests.small_runs.fixtures import Corpus

PROJECT = ["--logging.wandb_project", "tests"]
DWM = ["--policy.name", "dwm", "--logging.weights_interval_steps", "5"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def _records(run_dir: Path) -> list[Any]:
    """Returns what the runs of W&B under `run_dir` wrote, in order."""
    found = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in _messages(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            found.append(record)
    return found


def _messages(text: bytes) -> Iterator[bytes]:
    """Yields the messages of a log in LevelDB's format, after W&B's header of 7 bytes."""
    block, place, parts = 32768, 7, []
    while place + 7 <= len(text):
        if block - place % block < 7:  # no room for a header: the block's end is empty
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", text[place + 4 : place + 7])
        if not kind:
            return
        parts.append(text[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def _history(run_dir: Path) -> list[dict[str, Any]]:
    lines = [record.history.item for record in _records(run_dir) if record.HasField("history")]
    return [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
        for items in lines
    ]


def test_curves_histograms_and_pictures_of_a_resumed_run(corpus: Corpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*corpus.arguments(), *DWM, *PROJECT, "--logging.wandb_exp_name", "mine"]
    succeed(
        run_dir, *arguments, "--training.steps", "6", "--training.checkpoint_interval_steps", "4"
    )
    succeed(run_dir, *arguments, "--training.steps", "8", *RESUME)
    lines = _history(run_dir)
    curve = [(line["step"], line["lm loss"]) for line in lines if "lm loss" in line]
    expected = [(line["step"], line["loss"]) for line in metrics(run_dir, "train")]
    assert curve == expected
    assert {"learning-rate", "grad-norm", "train/weight_entropy"} <= set().union(*lines)
    assert any("train/weight" in line for line in lines)
    assert any("report/loss" in line for line in lines)
    runs = [record.run for record in _records(run_dir) if record.HasField("run")]
    assert {run.run_id for run in runs} == {(run_dir / "wandb_id.txt").read_text().strip()}
    assert {(run.project, run.display_name) for run in runs} == {("tests", "mine")}


def test_a_failure_of_wandb_ends_the_curves_and_not_the_run(corpus: Corpus, tmp_path: Path) -> None:
    """A project's name that it refuses."""
    arguments = [*corpus.arguments(), "--logging.wandb_project", "a/b", "--training.steps", "2"]
    done = pretrain(tmp_path / "run", *arguments)
    assert done.returncode == 0
    assert "W&B has no curves from here on" in done.stderr
    assert len(metrics(tmp_path / "run", "train")) == 2


def test_evaluation_before_the_first_step(corpus: Corpus, tmp_path: Path) -> None:
    held_out = [*corpus.held_out(), "--evaluation.interval_steps", "2"]
    arguments = [*corpus.arguments(), *held_out, "--training.steps", "2"]
    succeed(tmp_path / "run", *arguments, "--evaluation.at_start", "true")
    assert [line["step"] for line in metrics(tmp_path / "run", "evaluation")] == [0, 2]
    succeed(tmp_path / "without", *arguments)
    assert [line["step"] for line in metrics(tmp_path / "without", "evaluation")] == [2]
