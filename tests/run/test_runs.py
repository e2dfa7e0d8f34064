"""Whole runs from the command line: layouts, resume after a kill, what a run leaves, mistakes."""

from __future__ import annotations

import signal
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import torch
import yaml

from megatron_dwm.config import UserError
from megatron_dwm.config.load import load_config
from megatron_dwm.run.start import run
from tests.forking.client import run_python
from tests.small_runs.command import (
    kill_after_checkpoint,
    metrics,
    pretrain,
    succeed,
    without_time,
)
from tests.small_runs.fixtures import CORPUS, Corpus
from tests.small_runs.forked import Server

DWM = ("--policy.name", "dwm")
# Sums in another order are 1e-7 apart; 20 steps of Adam at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def alone(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process with learned weights and held-out evaluation."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    held_out = (*corpus.held_out(), "--evaluation.interval_steps", "20")
    succeed(run_dir, *corpus.arguments(), *DWM, *held_out, fresh=True)
    return run_dir


@pytest.mark.parametrize(
    ("layout", "torchrun"),
    [
        (["--parallel.tensor", "2"], False),
        (["--parallel.pipeline", "2"], False),
        ([], False),
        (["--parallel.sharded_optimizer", "true"], False),
        (["--parallel.context", "2"], False),
        ("--parallel.tensor 2 --parallel.sequence true --model.recompute full".split(), True),
    ],
    ids=str,
)
def test_layouts_train_alike(
    corpus: Corpus, alone: Path, tmp_path: Path, layout: list[str], torchrun: bool
) -> None:
    run_dir = tmp_path / "run"
    succeed(run_dir, *corpus.arguments(), *DWM, *layout, processes=2, fresh=torchrun)
    for phase in ("train", "weighting"):
        ours, expected = metrics(run_dir, phase), metrics(alone, phase)
        assert len(ours) == len(expected) > 0
        for line, other in zip(ours, expected, strict=True):
            assert abs(line["loss"] - other["loss"]) < LAYOUT_TOLERANCE, (phase, line["step"])


def test_a_run_leaves_what_design_says(alone: Path) -> None:
    config = yaml.safe_load((alone / "config.yaml").read_text())
    assert config["training"]["steps"] == 20 and config["training"]["clip_grad"] == 1.0
    train = metrics(alone, "train")
    assert [line["step"] for line in train] == list(range(1, 21))
    assert {"loss", "lr", "grad_norm", "tokens", "seconds", "weight_entropy"} <= set(train[0])
    assert train[-1]["tokens"] == 20 * 8 * 32
    assert all(abs(line["weight_mean"] - 1) < 1e-5 for line in train)
    assert train[0]["weight_std"] == 0.0 and train[-1]["weight_std"] > 0.0
    weighting = metrics(alone, "weighting")
    assert {"val_loss", "alignment_mean", "alignment_std"} <= set(weighting[0])
    assert weighting[0]["alignment_signal_to_noise"] >= 0.0
    assert "alignment_signal_to_noise" not in weighting[1]
    assert weighting[0]["weighting_gradient_cosine"] is None
    assert -1.0 <= weighting[1]["weighting_gradient_cosine"] <= 1.0
    [evaluation] = metrics(alone, "evaluation")
    assert {"austen", "target"} <= set(evaluation["domain_loss"])
    weights = ds.dataset(alone / "weights").to_table().to_pylist()
    assert {row["step"] for row in weights if row["alignment"] is None} == {10, 20}
    assert {row["domain"] for row in weights} <= {"austen", "speeches", "python", "web", "github"}
    assert (alone / "weighting" / "stage_1" / "weighting.safetensors").is_file()
    assert (alone / "checkpoints" / "step_00000020" / "shape.json").is_file()


def test_weighting_model_transfers_frozen(corpus: Corpus, alone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    load = ("--weighting.load", str(alone / "weighting" / "stage_1"), "--weighting.frozen", "true")
    succeed(run_dir, *corpus.arguments(), *DWM, *load, "--training.steps", "2")
    assert metrics(run_dir, "weighting") == []
    assert metrics(run_dir, "train")[0]["weight_std"] > 0.0


def test_a_run_starts_from_another_runs_model(corpus: Corpus, alone: Path, tmp_path: Path) -> None:
    """`model.init_from` under another layout: the first loss is the other model's."""
    init_from = ("--model.init_from", str(alone / "checkpoints" / "step_00000020"))
    arguments = [*corpus.arguments(), *init_from, "--training.steps", "1"]
    succeed(tmp_path / "one", *arguments)
    succeed(tmp_path / "two", *arguments, "--parallel.tensor", "2", processes=2)
    [one], [two] = metrics(tmp_path / "one", "train"), metrics(tmp_path / "two", "train")
    assert abs(one["loss"] - two["loss"]) < LAYOUT_TOLERANCE
    assert one["loss"] < metrics(alone, "train")[0]["loss"] - 0.1


def test_stages_begin_with_their_updates(corpus: Corpus, tmp_path: Path) -> None:
    staged = ("--weighting.mode", "staged", "--weighting.stages", "3")
    updates = ("--weighting.updates_per_stage", "2", "--training.steps", "7")
    succeed(tmp_path / "run", *corpus.arguments(), *DWM, *staged, *updates)
    weighting = metrics(tmp_path / "run", "weighting")
    assert [(line["stage"], line["step"]) for line in weighting] == [(2, 2), (2, 2), (3, 4), (3, 4)]
    stages = [line["stage"] for line in metrics(tmp_path / "run", "train")]
    assert stages == [1, 1, 2, 2, 3, 3, 3]
    assert {p.name for p in (tmp_path / "run/weighting").iterdir()} == {
        "stage_1",
        "stage_2",
        "stage_3",
    }


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(1, ["--model.precision", "bf16"]), (2, ["--parallel.sharded_optimizer", "true"])],
    ids=str,
)
def test_resume_after_a_kill_is_bit_exact(
    corpus: Corpus, tmp_path: Path, processes: int, layout: list[str]
) -> None:
    arguments = [*corpus.arguments(), *DWM, *layout, "--training.checkpoint_interval_steps", "6"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    succeed(whole, *arguments, processes=processes)
    kill_after_checkpoint(killed, arguments, processes)
    succeed(killed, *arguments, "--run.resume", "true", processes=processes)
    assert without_time(killed) == without_time(whole)
    tables = [ds.dataset(d / "weights").to_table().to_pylist() for d in (whole, killed)]
    key = ("step", "sample_id")
    ordered = [sorted(rows, key=lambda row: tuple(row[k] for k in key)) for rows in tables]
    assert ordered[0] == ordered[1]


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """Killed inside of the first one, when steps and weights are recorded already."""
    arguments = [*corpus.arguments(), "--training.steps", "2"]
    arguments += ["--logging.weights_interval_steps", "1"]
    fault = {"name": "send_signal", "place": "checkpoint", "call": 1, "rank": 0}
    killed = server.run(tmp_path / "run", arguments, fault={**fault, "number": signal.SIGKILL})
    assert killed.codes == [-signal.SIGKILL], killed.text
    before = without_time(tmp_path / "run")
    assert len(before) == 2 and list((tmp_path / "run" / "weights").glob("*.parquet"))
    job = server.succeed(tmp_path / "run", [*arguments, "--run.resume", "true"])
    assert "has no checkpoint and never had one: its 2 steps are trained again" in job.text
    assert without_time(tmp_path / "run") == before
    weights = ds.dataset(tmp_path / "run" / "weights").to_table().to_pylist()
    assert len(weights) == 2 * 8


MISTAKES = [
    (["--data.train", "nowhere_text_document"], "nowhere_text_document"),
    (["--data.tokenizer", "nowhere.model"], "nowhere.model"),
    (["--data.sequence_length", "100000000"], "data.sequence_length"),
    (["--training.steps", "0"], "training.steps"),
    (["--training.stps", "3"], "training.steps"),
    (["--model.vocab_size", "300"], "model.vocab_size"),
    (["--model.num_attention_heads", "3"], "num_attention_heads"),
    ([*DWM, "--validation.path", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--data.domain_key", "nonsense"], "nonsense"),
    ([*DWM, "--weighting.load", "nowhere"], "weighting.load"),
    (["--model.init_from", "nowhere"], "model.init_from"),
]


@pytest.mark.parametrize(("arguments", "word"), MISTAKES, ids=str)
def test_mistakes_are_one_line_before_any_process_group(
    corpus: Corpus, tmp_path: Path, arguments: list[str], word: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(load_config([*corpus.arguments(), *arguments, "--run.dir", str(tmp_path / "run")]))
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists() and not torch.distributed.is_initialized()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_on_the_command_line(corpus: Corpus, tmp_path: Path, processes: int) -> None:
    wrong = ("--training.steps", "0")
    arguments = [*corpus.arguments(), *wrong]
    done = pretrain(tmp_path / "run", *arguments, processes=processes, fresh=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "training.steps" in errors[0]
    assert not (tmp_path / "run").exists()
    if processes == 1:  # torchrun has a report and an exit code of its own
        assert done.returncode == 2 and done.stderr.splitlines() == errors


def test_a_key_without_effect_is_refused_or_warned_of_once(corpus: Corpus, tmp_path: Path) -> None:
    staged = ("--weighting.stages", "3")
    done = pretrain(tmp_path / "run", *corpus.arguments(), *DWM, *staged)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(
        "error: weighting.stages: has no effect: weighting.mode is online"
    )
    assert not (tmp_path / "run").exists()
    succeed(tmp_path / "run", *corpus.arguments(), "--training.steps", "1")
    # A resumed run is judged as a new one is, whatever has a key in its own config.yaml.
    again = (*corpus.arguments(), "--run.resume", "true", "--training.steps", "2")
    done = pretrain(tmp_path / "run", *again, *staged)
    assert done.returncode == 2 and "policy uniform learns no weights" in done.stderr
    done = pretrain(tmp_path / "run", *again, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: validation.path: set in the configuration file") == 1


def test_another_tokenizer_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    text = ["--input", str(CORPUS / "validation.jsonl"), "--vocab-size", "400"]
    run_python(["tools/train_tokenizer.py", *text, "--output", str(other)]).check_returncode()
    done = pretrain(tmp_path / "run", *corpus.arguments(), *DWM, "--data.tokenizer", str(other))
    assert done.returncode == 2
    assert "512" in done.stderr and "400" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_is_never_written_over(corpus: Corpus, alone: Path, tmp_path: Path) -> None:
    before = (alone / "metrics.jsonl").read_bytes()
    done = pretrain(alone, *corpus.arguments(), *DWM)
    assert done.returncode == 2 and "already holds a run" in done.stderr
    again = (*corpus.arguments(), *DWM, "--run.resume", "true")
    changed = pretrain(alone, *again, "--run.seed", "9")
    assert changed.returncode == 2 and len(changed.stderr.splitlines()) == 1
    assert "run.seed" in changed.stderr and "1234" in changed.stderr and "9" in changed.stderr
    assert (alone / "metrics.jsonl").read_bytes() == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    done = pretrain(foreign, *corpus.arguments())
    assert done.returncode == 2 and (foreign / "thesis.txt").read_text() == "mine"


def test_a_finished_run_is_left_alone(corpus: Corpus, alone: Path) -> None:
    before = {name: (alone / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    again = [*corpus.arguments(), *DWM, *corpus.held_out(), "--run.resume", "true"]
    done = pretrain(alone, *again, "--training.steps", "7")
    assert done.returncode == 0 and "at step 20: nothing to do" in done.stdout
    assert before == {name: (alone / name).read_bytes() for name in before}


def test_numbers_that_go_wrong_stop_the_run(corpus: Corpus, tmp_path: Path) -> None:
    # A step multiplies the parameters by 1 - 1e4 * 1e4.
    wild = ("--training.learning_rate", "1e4", "--training.weight_decay", "1e4")
    mine = (*wild, "--training.max_skipped_steps", "0")
    done = pretrain(tmp_path / "run", *corpus.arguments(), *mine)
    assert done.returncode == 1 and "error: step " in done.stderr
    assert "Traceback" not in done.stderr and "in a row were not finite" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_failing_rank_takes_the_job_down(corpus: Corpus, tmp_path: Path) -> None:
    """Rank 1 raises in the middle of training; the job ends with its traceback, without a hang."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, runpy, sys\n"
        "import megatron_dwm.run.loop as loop\n"
        "real = loop.train_step\n"
        "def failing(learner, method, batch, counters, **options):\n"
        "    if os.environ['RANK'] == '1' and counters.step == 2:\n"
        "        raise RuntimeError('the cable was pulled')\n"
        "    return real(learner, method, batch, counters, **options)\n"
        "loop.train_step = failing\n"
        "sys.argv = ['pretrain', *sys.argv[1:]]\n"
        "runpy.run_module('megatron_dwm.pretrain', run_name='__main__')\n"
    )
    command = [str(program), *corpus.arguments(), "--run.dir", str(tmp_path / "run")]
    done = run_python(command, ranks=2, fresh=True)
    assert done.returncode == 1
    assert "the cable was pulled" in done.stderr and "Traceback" in done.stderr
