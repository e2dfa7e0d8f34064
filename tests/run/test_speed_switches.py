"""Whole runs under the engine's speed switches: evaluation, checkpoints, resumed, mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from tests.small_runs.command import RESUME, metrics, pretrain
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same

SHARDED = ["--parallel.sharded_optimizer", "true"]
REDUCE = ["--parallel.overlap_grad_reduce", "true"]
BOTH = [*REDUCE, "--parallel.overlap_param_gather", "true"]
BF16 = ["--model.precision", "bf16"]
IN_BF16 = ["--parallel.grad_reduce_in_fp32", "false"]
DWM = ["--policy.name", "dwm"]
METHODS = {
    "fresh": DWM,
    "training": [*DWM, "--weighting.update_on", "training"],
    "gradient_alignment": ["--policy.name", "gradient_alignment", "--policy.alignment_warmup", "3"],
    "opus": [
        *("--policy.name", "opus", "--weighting.pool_batches", "2"),
        *("--policy.alignment_warmup", "3", "--policy.redundancy", "0.5"),
        *("--policy.sketch_size", "64"),
    ],
    "blade": [
        *("--policy.name", "blade", "--policy.sync_first_step", "3"),
        *("--policy.sync_interval_steps", "4", "--policy.reference_steps", "2"),
        *("--policy.reference_learning_rate", "0.003", "--policy.offload_reference", "true"),
    ],
}


def _arguments(corpus: Corpus, method: str) -> list[str]:
    often = ["--evaluation.interval_steps", "4", "--training.checkpoint_interval_steps", "3"]
    often += ["--training.steps", "9"]
    return [*corpus.arguments(), *METHODS[method], *corpus.held_out(), *often]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_with_both_overlaps_is_the_run_without(
    server: Server, corpus: Corpus, tmp_path: Path, method: str
) -> None:
    """Stopped and resumed, then with saves in the background, against one run."""
    arguments = [*_arguments(corpus, method), *SHARDED]
    plain, switched = tmp_path / "plain", tmp_path / "switched"
    server.succeed(plain, arguments, ranks=2)
    stop = {"name": "send_signal", "place": "training", "call": 5, "number": 15, "rank": 0}
    server.succeed(switched, [*arguments, *BOTH], ranks=2, fault=stop)
    assert read_manifest(list_checkpoints(switched)[-1]).state.step < 9
    go_on = [*arguments, *BOTH, *RESUME, "--training.checkpoint_async", "true"]
    server.succeed(switched, go_on, ranks=2)
    assert_same(switched, plain)


def test_a_run_may_take_the_switches_up_when_it_is_resumed(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    arguments = [*_arguments(corpus, "training"), *SHARDED, *BF16]
    plain, resumed = tmp_path / "plain", tmp_path / "resumed"
    server.succeed(plain, arguments, ranks=2)
    stop = {"name": "send_signal", "place": "training", "call": 5, "number": 15, "rank": 0}
    server.succeed(resumed, arguments, ranks=2, fault=stop)
    fused = ["--model.cross_entropy_loss_fusion", "true"]
    server.succeed(resumed, [*arguments, *BOTH, *fused, *RESUME], ranks=2)
    assert_same(resumed, plain)


def test_a_run_that_reduces_in_bf16_is_resumed_bit_for_bit(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    arguments = [*_arguments(corpus, "training"), *SHARDED, *BF16, *IN_BF16, *BOTH]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    server.succeed(whole, arguments, ranks=2)
    stop = {"name": "send_signal", "place": "training", "call": 5, "number": 15, "rank": 0}
    server.succeed(resumed, arguments, ranks=2, fault=stop)
    server.succeed(resumed, [*arguments, *RESUME], ranks=2)
    assert_same(resumed, whole)
    fp32 = tmp_path / "fp32"
    server.succeed(fp32, [*_arguments(corpus, "training"), *SHARDED, *BF16], ranks=2)
    ours, theirs = metrics(whole, "train"), metrics(fp32, "train")
    assert [line["grad_norm"] for line in ours] != [line["grad_norm"] for line in theirs]
    # A rounding of 2**-9 in every gradient, for nine steps at 3e-3: small beside a loss of 6.
    for line, other in zip(ours, theirs, strict=True):
        assert abs(line["loss"] - other["loss"]) < 0.02


MISTAKES = [
    (BOTH, "parallel.overlap_param_gather: expected parallel.sharded_optimizer true"),
    (
        [*SHARDED, "--parallel.overlap_param_gather", "true"],
        "parallel.overlap_param_gather: expected parallel.overlap_grad_reduce true",
    ),
    (IN_BF16, "parallel.grad_reduce_in_fp32: has no effect: model.precision is fp32"),
    (["--parallel.ddp_bucket_size", "9"], "parallel.ddp_bucket_size: has no effect"),
    (["--model.apply_rope_fusion", "true"], "model.apply_rope_fusion: has no effect"),
    (["--parallel.tp_comm_overlap", "true"], "parallel.tp_comm_overlap: has no effect"),
    (
        ["--model.cross_entropy_loss_fusion", "true"],
        "model.cross_entropy_loss_fusion: has no effect: model.precision is fp32",
    ),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES, ids=lambda value: str(value)[:60])
def test_combinations_without_sense_are_one_line(
    corpus: Corpus, tmp_path: Path, options: list[str], line: str
) -> None:
    done = pretrain(tmp_path / "run", *corpus.arguments(), *options)
    errors = [said for said in done.stderr.splitlines() if not said.startswith("warning: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert line in errors[0]


def test_tensor_overlap_is_refused_on_a_cpu(corpus: Corpus, tmp_path: Path) -> None:
    layout = ["--parallel.tensor", "2", "--parallel.sequence", "true", *BF16]
    options = [*corpus.arguments(), *layout, "--parallel.tp_comm_overlap", "true"]
    done = pretrain(tmp_path / "run", *options, processes=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert "parallel.tp_comm_overlap: " in errors[0] and "there is no GPU" in errors[0]


def test_a_fusion_that_the_machine_lacks_is_one_warning(corpus: Corpus, tmp_path: Path) -> None:
    options = [*corpus.arguments(), *BF16, "--training.steps", "1", "--policy.name", "uniform"]
    done = pretrain(tmp_path / "run", *options, "--model.apply_rope_fusion", "true")
    assert done.returncode == 0, done.stderr
    assert "model.apply_rope_fusion: rotary embeddings are not fused" in done.stderr
