"""Resuming: bit for bit under every policy, never with something else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_dwm.checkpoint.manifest import (
    list_checkpoints,
    read_manifest,
)
from tests.small_runs.command import RESUME, metrics, scheduled_rate
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same

# Sums in another order are 1e-7 apart; a few steps of Adam may multiply that.
LAYOUT_TOLERANCE = 1e-5
STAGED = ["--weighting.mode", "staged", "--weighting.stages", "2"]
POLICIES = {
    "uniform": ["--policy.name", "uniform"],
    "own": ["--policy.name", "dwm", *STAGED, "--weighting.updates_per_stage", "3"],
    "llm": ["--policy.name", "dwm", "--weighting.encoder", "llm"],
    "training": [
        *("--policy.name", "dwm", "--weighting.encoder", "llm"),
        *("--weighting.update_on", "training"),
    ],
    "domain_mean": ["--policy.name", "domain_mean"],
    "loss_reweighting": ["--policy.name", "loss_reweighting", "--weighting.group", "global"],
    "fixed": ["--policy.name", "fixed", "--policy.column", "tokens"],
    "curriculum": ["--policy.name", "curriculum", "--policy.pacing_start", "0.2"],
    "validation_mixing": ["--policy.name", "validation_mixing", "--policy.mix_fraction", "0.25"],
    "gradient_alignment": [
        *("--policy.name", "gradient_alignment", "--policy.alignment_interval", "2"),
        *("--policy.alignment_warmup", "3", "--policy.alignment_decay", "0.5"),
    ],
    "greedy": [
        *("--policy.name", "gradient_alignment", "--policy.alignment_choice", "greedy"),
        *("--policy.alignment_warmup", "3", "--weighting.group", "global"),
    ],
    "opus": [
        *("--policy.name", "opus", "--weighting.pool_batches", "3"),
        *("--policy.alignment_warmup", "3", "--policy.jacobian", "exact"),
    ],
    "similarity": ["--policy.name", "similarity"],
    "similarity, at a reading": ["--policy.name", "similarity", "--weighting.unit", "document"],
    "outside": ["--policy.name", "examples.plugin.loss_rank:LossRank"],
    "outside, with a state": [
        *("--policy.name", "examples.plugin.loss_rank:RecentLossRank"),
        *("--policy.options.window_steps", "4", "--policy.options.strength", "3"),
    ],
    "outside, learning": ["--policy.name", "tests.run.plugin_methods:Parity"],
    "outside, after the pass": ["--policy.name", "tests.run.plugin_methods:Louder"],
}
LAYOUTS = {
    "own": ["--parallel.pipeline", "2"],
    "llm": ["--parallel.tensor", "2"],
    "gradient_alignment": ["--parallel.sharded_optimizer", "true"],
    "greedy": ["--parallel.tensor", "2"],
    "opus": ["--parallel.sharded_optimizer", "true"],
    "similarity, at a reading": ["--parallel.pipeline", "2"],
    "outside, with a state": [],
    "outside, learning": ["--parallel.tensor", "2"],
}
# The call at which the run is stopped: inside a phase, or right after an update.
STOPPED_AT = {
    "own": ("weighting", 2),
    "llm": ("weighting", 1),
    "similarity": ("training", 7),
    "similarity, at a reading": ("reading", 1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_resume_is_bit_exact_under_every_policy(
    server: Server, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    """Stopped by a signal and gone on, against one run; async saves on the way."""
    arguments = [*corpus.arguments(), *POLICIES[name], "--training.steps", "10"]
    arguments += ["--logging.weights_interval_steps", "2"]
    arguments += LAYOUTS.get(name, [])
    ranks = 2 if name in LAYOUTS else 1
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    server.succeed(whole, arguments, ranks=ranks)
    place, call = STOPPED_AT.get(name, ("training", 6))
    stop = {"name": "send_signal", "place": place, "call": call, "number": 15, "rank": 0}
    server.succeed(resumed, arguments, ranks=ranks, fault=stop)
    state = read_manifest(list_checkpoints(resumed)[-1]).state
    assert state.step < 10 and (state.stage_updates == call) == (place != "training")
    go_on = [*arguments, *RESUME, "--training.checkpoint_async", "true"]
    server.succeed(resumed, go_on, ranks=ranks)
    assert_same(resumed, whole)


CHANGED_KEYS = [
    ("run.seed", "1234", "4321"),
    ("model.num_layers", "None", "2"),
    ("policy.name", "dwm", "uniform"),
    ("training.global_batch_size", "8", "16"),
    ("data.sequence_length", "32", "16"),
]


@pytest.mark.parametrize(("key", "before", "now"), CHANGED_KEYS, ids=str)
def test_changed_keys_are_refused_with_both_values(
    server: Server, stopped: tuple[Path, list[str], Path], key: str, before: str, now: str
) -> None:
    run_dir, arguments, _ = stopped
    job = server.run(run_dir, [*arguments, f"--{key}", now])
    assert job.codes == [2], job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert key in line and before in line and now in line and "--run.allow_changed" in line


def _other_tokens(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def _another_line(file: Path) -> None:
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[1:]) + "\n")


CHANGED_FILES: list[tuple[str, str, Callable[[Path], None]]] = [
    ("data.train", "data.bin", _other_tokens),
    ("validation.path", "validation.jsonl", _another_line),
]


@pytest.mark.parametrize(
    ("key", "name", "change"), CHANGED_FILES, ids=lambda value: str(value)[:16]
)
def test_changed_files_are_refused_and_can_be_allowed(
    server: Server,
    stopped: tuple[Path, list[str], Path],
    tmp_path: Path,
    key: str,
    name: str,
    change: Callable[[Path], None],
) -> None:
    """The same size, the same path, other content."""
    origin, arguments, folder = stopped
    run_dir = tmp_path / "run"
    shutil.copytree(origin, run_dir)
    before = (folder / name).read_bytes()
    stamp = (folder / name).stat()
    try:
        change(folder / name)
        os.utime(folder / name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        job = server.run(run_dir, arguments)
        assert job.codes == [2], job.text
        [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
        assert key in line and line.count("bytes)") == 2
        other = "run.seed" if key == "data.train" else "data.train"
        assert server.run(run_dir, [*arguments, "--run.allow_changed", other]).codes == [2]
        server.succeed(run_dir, [*arguments, "--run.allow_changed", key])
    finally:
        (folder / name).write_bytes(before)


def test_what_may_change_does(
    server: Server, stopped: tuple[Path, list[str], Path], tmp_path: Path
) -> None:
    """And a metrics.jsonl that is gone is noticed."""
    run_dir = tmp_path / "run"
    shutil.copytree(stopped[0], run_dir)
    (run_dir / "metrics.jsonl").unlink()
    changes = ["--training.learning_rate", "0.001", "--training.steps", "4"]
    job = server.succeed(run_dir, [*stopped[1], *changes])
    assert "lacks 2 of the 2 steps" in job.text and "Traceback" not in job.text
    lines = metrics(run_dir, "train")
    assert [line["step"] for line in lines] == [3, 4]
    # No warm-up in 4 steps: a cosine from the new rate to a tenth of it, which the last step has.
    rates = [scheduled_rate(step, steps=4, warm_up=0, peak=0.001) for step in (3, 4)]
    assert rates[-1] == pytest.approx(0.0001)
    assert [line["lr"] for line in lines] == pytest.approx(rates)


def test_a_changed_weighting_rate_takes_effect(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """With a rate of nearly nothing an update leaves the weighting model as it was."""
    run_dir = tmp_path / "run"
    arguments = [*corpus.arguments(), "--policy.name", "dwm", "--training.warmup_fraction", "0"]
    server.succeed(run_dir, [*arguments, "--training.steps", "6"])
    file = run_dir / "weighting" / "stage_1" / "weighting.safetensors"
    before = load_file(file)
    assert float(before["head.weight"].abs().max()) > 1e-4, "the first update was made"
    rate = ["--weighting.learning_rate", "1e-30", "--training.steps", "10"]
    server.succeed(run_dir, [*arguments, *RESUME, *rate])
    assert [line["step"] for line in metrics(run_dir, "weighting")] == [5, 8]
    after = load_file(file)
    assert all(float((before[name] - after[name]).abs().max()) < 1e-20 for name in before)


def test_what_takes_no_effect_is_named(
    server: Server, stopped: tuple[Path, list[str], Path], tmp_path: Path
) -> None:
    """A resumed run has its parameters from the checkpoint, whatever it is told to start from."""
    run_dir = tmp_path / "run"
    shutil.copytree(stopped[0], run_dir)
    [checkpoint] = list_checkpoints(run_dir)
    start = ["--model.init_from", str(checkpoint), "--run.allow_changed", "model.init_from"]
    job = server.succeed(run_dir, [*stopped[1], *start])
    [line] = [line for line in job.text.splitlines() if "model.init_from" in line]
    assert line.startswith("warning: ") and "no effect" in line
