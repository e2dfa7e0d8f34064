"""Whole runs in FP8 numerics on a CPU, from the command line."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import REPOSITORY, Corpus
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


def compare(checkpoint: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "examples/fp8_alignments.py", str(checkpoint), *options],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_alignments_of_a_run_are_compared_with_fp8s(corpus: Corpus, tmp_path: Path) -> None:
    succeed(tmp_path / "run", *corpus.arguments(), *DWM)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000020"
    done = compare(checkpoint, "--batches", "3")
    assert done.returncode == 0, done.stderr
    *rows, mean = [
        [float(word) for word in line.replace("|", " ").split()]
        for line in done.stdout.splitlines()
        if line.strip()[0] in "-0123456789"
    ]
    assert len(rows) == 3
    for correlation, of_ranks, error, _ in rows:
        # Rounding is seen, and does not hide the signal (tests/bilevel/test_fp8.py).
        assert 0.9 < correlation <= 1 and 0.8 < of_ranks <= 1 and 0.001 < error < 0.5, rows
    for column, of_rows in zip(mean, zip(*rows, strict=True), strict=True):
        assert column == pytest.approx(sum(of_rows) / 3, abs=2e-4)
    mistake = compare(checkpoint, "--batches", "21")
    assert mistake.returncode == 2 and len(mistake.stderr.splitlines()) == 1, mistake.stderr
    assert "--batches: expected 1 to 20" in mistake.stderr
