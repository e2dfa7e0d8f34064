"""Runs with policy excess_loss: layouts, resumed, recorded, and references that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same

COMMON = ["--training.steps", "8", "--logging.weights_interval_steps", "1"]
TOKENS = ["--weighting.unit", "token", "--policy.keep_scope", "sequence"]
DOCUMENTS = ["--weighting.unit", "document", "--weighting.group", "micro_batch"]
# Sums in another order are 1e-7 apart; 8 steps of Adam at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference(server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of plain training."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    server.succeed(run_dir, [*corpus.arguments(), "--policy.name", "uniform"])
    return list_checkpoints(run_dir)[-1]


def _arguments(corpus: Corpus, reference: Path, *options: str) -> list[str]:
    method = ["--policy.name", "excess_loss", "--policy.reference", str(reference)]
    return [*corpus.arguments(), *COMMON, *method, *options]


@pytest.fixture(scope="module")
def tokens(
    server: Server, corpus: Corpus, reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of one process that keeps tokens of every sample."""
    run_dir = tmp_path_factory.mktemp("tokens") / "run"
    server.succeed(run_dir, _arguments(corpus, reference, *TOKENS))
    return run_dir


@pytest.mark.parametrize(
    "layout",
    [
        ["--parallel.tensor", "2", "--parallel.sequence", "true"],
        ["--parallel.pipeline", "2"],
        ["--parallel.sharded_optimizer", "true"],
    ],
    ids=str,
)
def test_layouts_train_alike(
    server: Server, corpus: Corpus, reference: Path, tokens: Path, tmp_path: Path, layout: list[str]
) -> None:
    run_dir = tmp_path / "run"
    server.succeed(run_dir, [*_arguments(corpus, reference, *TOKENS), *layout], ranks=2)
    for line, other in zip(metrics(run_dir, "train"), metrics(tokens, "train"), strict=True):
        assert abs(line["loss"] - other["loss"]) < LAYOUT_TOLERANCE, line["step"]


@pytest.mark.parametrize("options", [TOKENS, DOCUMENTS], ids=["tokens", "documents"])
def test_a_run_is_resumed_bit_for_bit(
    server: Server, corpus: Corpus, reference: Path, tmp_path: Path, options: list[str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = _arguments(corpus, reference, *options)
    server.succeed(whole, arguments)
    stop = {"name": "send_signal", "place": "training", "call": 5, "number": 15, "rank": 0}
    server.succeed(resumed, arguments, fault=stop)
    assert 3 < read_manifest(list_checkpoints(resumed)[-1]).state.step < 8
    server.succeed(resumed, [*arguments, *RESUME])
    assert_same(resumed, whole)


def test_tokens_are_recorded_by_sample(tokens: Path) -> None:
    rows = ds.dataset(tokens / "weights").to_table().to_pylist()
    assert len(rows) == 8 * 8
    assert all(row["tokens"] == 32 and abs(row["weight"] - 1.0) < 1e-6 for row in rows)
    for line in metrics(tokens, "train"):
        kept = round(0.6 * 32)
        assert line["weight_min"] == 0.0 and line["weight_max"] == pytest.approx(32 / kept)
        assert line["weight_effective_sample_size"] == pytest.approx(kept / 32)


def test_flops_count_the_references_pass(tokens: Path, reference: Path) -> None:
    """Forward and backward are three passes, and the reference's is one more."""
    [step, *_] = metrics(tokens, "train")
    [plain, *_] = metrics(reference.parents[1], "train")
    assert step["flops"] == pytest.approx(plain["flops"] * 4 / 3)


def test_a_changed_reference_is_noticed(
    server: Server, corpus: Corpus, reference: Path, tmp_path: Path
) -> None:
    copied, run_dir = tmp_path / "reference", tmp_path / "run"
    shutil.copytree(reference, copied)
    arguments = [*_arguments(corpus, copied), "--training.checkpoint_interval_steps", "4"]
    stop = {"name": "send_signal", "place": "training", "call": 5, "number": 15, "rank": 0}
    server.succeed(run_dir, arguments, fault=stop)
    manifest = copied / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    job = server.run(run_dir, [*arguments, *RESUME])
    assert job.codes == [2] and "policy.reference" in job.text and "Traceback" not in job.text


def test_references_that_do_not_fit(
    server: Server, corpus: Corpus, reference: Path, tmp_path: Path
) -> None:
    larger, damaged = tmp_path / "larger", tmp_path / "damaged"
    vocabulary = ["--policy.name", "uniform", "--training.steps", "1", "--model.vocab_size", "640"]
    server.succeed(larger, [*corpus.arguments(), *vocabulary])
    shutil.copytree(reference, damaged)
    shape = json.loads((damaged / "shape.json").read_text())
    (damaged / "shape.json").write_text(json.dumps({**shape, "num_layers": 1}))
    (tmp_path / "empty").mkdir()
    for directory, words in (
        (list_checkpoints(larger)[-1], "has a vocabulary of 640, the LLM has 512"),
        (damaged, "policy.reference: "),
        (tmp_path / "empty", "policy.reference: "),
        (tmp_path / "missing", "policy.reference: "),
    ):
        job = server.run(tmp_path / "run", _arguments(corpus, directory))
        assert job.codes == [2] and "Traceback" not in job.text, job.text
        assert words in job.text and not (tmp_path / "run").exists()


def test_a_ratio_that_keeps_all_is_said(
    server: Server, corpus: Corpus, reference: Path, tmp_path: Path
) -> None:
    arguments = [*_arguments(corpus, reference), "--training.steps", "1", "--weighting.unit"]
    for unit, ratio, says in (("sample", "0.95", 1), ("sample", "0.8", 0), ("token", "0.95", 0)):
        run = tmp_path / f"{unit}{ratio}"
        job = server.succeed(run, [*arguments, unit, "--policy.keep_ratio", ratio])
        assert job.text.count("of a group of 8 samples (training.global_batch_size)") == says


def test_units_of_other_methods(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    arguments = [*corpus.arguments(), "--policy.name", "uniform", "--weighting.unit", "token"]
    job = server.run(tmp_path / "run", arguments)
    assert job.codes == [2] and "weighting.unit token: expected document or sample" in job.text
