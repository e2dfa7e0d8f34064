"""Whole runs in FP8 numerics on a CPU, from the command line."""

from __future__ import annotations

import math
from pathlib import Path

from tests.training.conftest import Corpus
from tests.training.runs import metrics, pretrain, succeed

DWM = ("--policy.name", "dwm")


def test_the_bi_level_loop_runs_in_emulated_fp8(corpus: Corpus, tmp_path: Path) -> None:
    """As users start it: bf16 parameters, FP8 products, tensor parallel, learned weights."""
    emulated = ("--model.precision", "fp8", "--model.fp8_emulation", "true")
    layout = ("--parallel.tensor", "2")
    run_dir = tmp_path / "run"
    succeed(run_dir, *corpus.arguments(), *DWM, *emulated, *layout, processes=2)
    losses = [line["loss"] for line in metrics(run_dir, "train")]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    updates = metrics(run_dir, "weighting")
    assert updates and all(math.isfinite(line["val_loss"]) for line in updates)
    assert metrics(run_dir, "train")[-1]["weight_std"] > 0


def test_fp8_without_a_gpu_says_why_it_is_bf16(corpus: Corpus, tmp_path: Path) -> None:
    steps = ("--training.steps", "1", "--model.precision", "fp8")
    done = pretrain(tmp_path / "run", *corpus.arguments(), *steps)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "model.precision fp8" in line]
    assert "there is no GPU" in line and "--model.fp8_emulation true" in line
