"""Whole runs in FP8 numerics on a CPU, from the command line."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from megatron_dwm.config import (
    BilevelConfig,
    Config,
    DataConfig,
    ModelConfig,
    PolicyConfig,
    ProfilingConfig,
    ValidationConfig,
)
from megatron_dwm.config.validate import validate_config
from megatron_dwm.model import resolve_shape
from megatron_dwm.model.shape import heads_of
from tests.forking.client import REPOSITORY, run_python
from tests.small_runs.command import metrics, pretrain, succeed
from tests.small_runs.fixtures import Corpus

SCRIPT = "examples/fp8_alignments.py"
DWM = ("--policy.name", "dwm")
# One step's trace: what the run profiles is no business of the script's.
PROFILED = ("--profiling.tool", "torch", "--profiling.ranks", "[0,1]")
STEPS = ("--profiling.first_step", "1", "--profiling.last_step", "1")


@pytest.fixture(scope="module")
def emulated(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As users start it: bf16 parameters, FP8 products, tensor parallel, learned weights."""
    run_dir = tmp_path_factory.mktemp("fp8") / "run"
    fp8 = ("--model.precision", "fp8", "--model.fp8_emulation", "true")
    options = (*DWM, *fp8, *PROFILED, *STEPS, "--parallel.tensor", "2")
    succeed(run_dir, *corpus.arguments(), *options, processes=2)
    return run_dir


def test_the_bi_level_loop_runs_in_emulated_fp8(emulated: Path) -> None:
    losses = [line["loss"] for line in metrics(emulated, "train")]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    updates = metrics(emulated, "weighting")
    assert updates and all(math.isfinite(line["val_loss"]) for line in updates)
    assert metrics(emulated, "train")[-1]["weight_std"] > 0


def test_fp8_without_a_gpu_says_why_it_is_bf16(corpus: Corpus, tmp_path: Path) -> None:
    steps = ("--training.steps", "1", "--model.precision", "fp8")
    done = pretrain(tmp_path / "run", *corpus.arguments(), *steps)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "model.precision fp8" in line]
    assert "there is no GPU" in line and "--model.fp8_emulation true" in line


def compare(source: Path, *options: str, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    return run_python([SCRIPT, str(source), *options], fresh=fresh)


def refused(source: Path, *options: str) -> str:
    done = compare(source, *options)
    assert done.returncode == 2 and not done.stdout, done.stderr
    [line] = done.stderr.splitlines()
    return line


def test_alignments_of_a_run_are_compared_with_fp8s(emulated: Path) -> None:
    """Of a run's newest checkpoint, whatever it profiled and in however many processes."""
    done = compare(emulated, "--batches", "3", fresh=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[0].startswith("bf16 against emulated FP8 ")
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


def test_mistakes_with_the_comparison_are_one_line(emulated: Path, tmp_path: Path) -> None:
    assert "--batches: expected 1 to 20" in refused(emulated, "--batches", "21")
    assert "no such directory" in refused(tmp_path / "missing")
    whole = emulated / "checkpoints" / "step_00000020"
    for name in ("without_data", "cut_short", "converted"):
        shutil.copytree(whole, tmp_path / name)
    next((tmp_path / "without_data" / "llm").glob("*.distcp")).unlink()
    assert ".distcp is missing" in refused(tmp_path / "without_data")
    rest = tmp_path / "cut_short" / "training.pt"
    rest.write_bytes(rest.read_bytes()[:100])
    assert "training.pt has 100 bytes instead of" in refused(tmp_path / "cut_short")
    (tmp_path / "converted" / "manifest.json").unlink()
    assert "manifest.json is missing" in refused(tmp_path / "converted")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fp8_alignments", REPOSITORY / SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("model", "unquantized"),
    [
        (ModelConfig(), "fp32"),
        (ModelConfig(fp8_emulation=True, fp8_first_last_bf16=True), "fp32"),
        (ModelConfig(precision="bf16"), "bf16"),
        (ModelConfig(precision="fp8", fp8_recipe="mxfp8", fp8_first_last_bf16=True), "bf16"),
        (ModelConfig(precision="fp8", fp8_recipe="delayed"), "bf16"),
    ],
)
def test_what_is_compared_may_be_run(model: ModelConfig, unquantized: str) -> None:
    """Whatever the run was; the rules of a run hold for both sides, in one process."""
    of_run = Config(
        model=replace(model, num_layers=4),
        data=DataConfig(train=["unread"], tokenizer="unread"),
        validation=ValidationConfig(path="unread"),
        policy=PolicyConfig(name="dwm"),
        bilevel=BilevelConfig(estimator="finite_difference"),
        profiling=ProfilingConfig(tool="torch", ranks=[7]),
    )
    exact = script()._unquantized(of_run, 8)
    quantized = script()._in_fp8(exact, of_run)
    heads = heads_of(resolve_shape(of_run.model))
    for config in (exact, quantized):
        validate_config(config, heads, world_size=1)
    assert exact.model.precision == unquantized and not exact.model.uses_fp8
    assert quantized.model.precision == unquantized and quantized.model.fp8_emulation
    assert quantized.model.fp8_first_last_bf16 == model.fp8_first_last_bf16
