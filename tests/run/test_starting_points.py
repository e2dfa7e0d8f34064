"""Runs that start from a checkpoint of an earlier run, with Adam's moments and without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_dwm.checkpoint.manifest import list_checkpoints
from megatron_dwm.checkpoint.optimizer_state import saved_step
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

STEPS = ["--training.steps", "2", "--training.warmup_fraction", "0"]


@pytest.fixture(scope="module")
def earlier(server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run of three steps."""
    run_dir = tmp_path_factory.mktemp("earlier") / "run"
    server.succeed(run_dir, [*corpus.arguments(), "--training.steps", "3"])
    return list_checkpoints(run_dir)[-1]


@pytest.mark.parametrize("layout", [[], ["--parallel.sharded_optimizer", "true"]], ids=str)
def test_moments_come_along_if_asked_for(
    server: Server, corpus: Corpus, earlier: Path, layout: list[str], tmp_path: Path
) -> None:
    """Adam counts on from there; the first gradient is the same, and the first step is not."""
    start = [*corpus.arguments(), *STEPS, *layout, "--model.init_from", str(earlier)]
    server.succeed(tmp_path / "anew", start)
    server.succeed(tmp_path / "on", [*start, "--model.init_optimizer", "true"])
    assert (_count(tmp_path / "anew"), _count(tmp_path / "on")) == (2, 5)
    anew, on = (metrics(tmp_path / name, "train") for name in ("anew", "on"))
    assert anew[0]["loss"] == on[0]["loss"] and anew[0]["grad_norm"] == on[0]["grad_norm"]
    assert anew[1]["loss"] != on[1]["loss"]


def _count(run_dir: Path) -> int:
    folder = list_checkpoints(run_dir)[-1] / "llm"
    return int(saved_step(torch.load(folder / "common.pt", weights_only=True)))


def test_the_model_may_be_gone_and_the_newest_checkpoint_damaged(
    server: Server, corpus: Corpus, earlier: Path, tmp_path: Path
) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    shutil.copytree(earlier, model)
    start = [*corpus.arguments(), "--model.init_from", str(model)]
    start += ["--training.checkpoint_interval_steps", "1"]
    server.succeed(run_dir, [*start, *STEPS])
    shutil.rmtree(model)
    first, second = list_checkpoints(run_dir)
    (second / "shape.json").write_text("{")
    server.succeed(run_dir, [*start, *STEPS, *RESUME])
    assert list_checkpoints(run_dir) == [first, second]
    assert (second / "manifest.json").is_file() and list(second.parent.glob("*.damaged*"))
