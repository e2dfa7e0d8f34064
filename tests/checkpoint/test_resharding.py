"""Checkpoints that are loaded under another layout, or by another kind of optimizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.small_runs.command import RESUME, metrics, succeed
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

# Sums in another order are 1e-7 apart; a few steps of Adam may multiply that.
LAYOUT_TOLERANCE = 1e-5
WIDE = ["--parallel.tensor", "2"]
SHARDED = ["--parallel.sharded_optimizer", "true"]
# Several buckets, whose ends are padded: a norm's 64 parameters are no multiple of 128.
BUCKETS = [*SHARDED, "--parallel.overlap_grad_reduce", "true"]
BUCKETS += ["--parallel.overlap_param_gather", "true", "--parallel.ddp_bucket_size", "20000"]
# (what decides the layout, ranks) of three parts of a run
MOVES = {
    "sharded": [([*WIDE, *SHARDED], 4), (["--parallel.pipeline", "2", *SHARDED], 2), (WIDE, 4)],
    "context": [
        (["--parallel.context", "2", *SHARDED], 4),
        (WIDE, 2),
        (["--parallel.context", "2"], 2),
    ],
    "buckets": [(BUCKETS, 2), (["--parallel.context", "2", *BUCKETS], 2), ([], 1)],
    "same_buckets": [(BUCKETS, 2), (BUCKETS, 2), (BUCKETS, 2)],
    "kinds": [([*WIDE, *SHARDED], 4), ([], 1), (SHARDED, 2)],
    "bf16": [([], 2), (SHARDED, 2), ([], 2)],
}


@pytest.mark.parametrize("name", MOVES)
def test_optimizer_state_moves_between_layouts_and_kinds(
    server: Server, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    """Sharded and plain, one layout to another and on to a third, against one run alone."""
    arguments = [*corpus.arguments(), "--policy.name", "dwm", "--training.steps", "12"]
    # In bf16 another order of sums is seen at once, so there the layout stays and only kinds move,
    # without clipping: a sharded optimizer adds up the gradient's norm in an order of its own.
    bf16 = ["--model.precision", "bf16", "--training.clip_grad", "0"]
    arguments += bf16 if name == "bf16" else []
    server.succeed(tmp_path / "alone", arguments, ranks=2 if name == "bf16" else 1)
    expected = metrics(tmp_path / "alone", "train")
    run_dir, resume = tmp_path / "run", []
    for number, (layout, ranks) in enumerate(MOVES[name]):
        stop = {"name": "send_signal", "place": "training", "number": 15, "rank": 0, "call": 4}
        fault = stop if number < 2 else None
        server.succeed(run_dir, [*arguments, *resume, *layout], ranks=ranks, fault=fault)
        resume = RESUME
    lines = metrics(run_dir, "train")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line, other in zip(lines, expected, strict=True):
        assert abs(line["loss"] - other["loss"]) < LAYOUT_TOLERANCE, line["step"]
        assert abs(line["grad_norm"] - other["grad_norm"]) < 1e-3, line["step"]


def test_a_checkpoint_loads_under_another_layout(corpus: Corpus, tmp_path: Path) -> None:
    arguments = [*corpus.arguments(), "--training.checkpoint_interval_steps", "5"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    succeed(whole, *arguments)
    shutil.copytree(whole, moved)
    for step in (10, 15, 20):
        shutil.rmtree(moved / "checkpoints" / f"step_{step:08d}")
    tensor = ("--parallel.tensor", "2")
    succeed(moved, *arguments, "--run.resume", "true", *tensor, processes=2)
    for line, other in zip(metrics(moved, "train"), metrics(whole, "train"), strict=True):
        assert abs(line["loss"] - other["loss"]) < LAYOUT_TOLERANCE, line["step"]
