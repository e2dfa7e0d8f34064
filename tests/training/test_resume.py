"""Resuming: bit for bit under every policy, under another layout, never with something else.

And files from elsewhere: what a checkpoint holds is data, whoever wrote it.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dwm.checkpoint.manifest import (
    FileRecord,
    Manifest,
    checkpoint_dir,
    list_checkpoints,
    read_manifest,
    record_file,
    remove_old,
    tidy,
    write_manifest,
)
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config, PolicyConfig, UserError, WeightingConfig
from megatron_dwm.files.atomic import replace_folder
from megatron_dwm.run.changes import refuse_changes
from tests.training.conftest import Corpus
from tests.training.forked import Server
from tests.training.runs import RESUME, metrics, scheduled_rate
from tests.training.test_faults import assert_same

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
    "validation_mixing": ["--policy.name", "validation_mixing", "--policy.mix_fraction", "0.25"],
}
LAYOUTS = {"own": ["--parallel.pipeline", "2"], "llm": ["--parallel.tensor", "2"]}
# The call at which the run is stopped: inside a phase, or right after an update.
STOPPED_AT = {"own": ("weighting", 2), "llm": ("weighting", 1)}


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
    assert state.step < 10 and (state.stage_updates == call) == (place == "weighting")
    go_on = [*arguments, *RESUME, "--training.checkpoint_async", "true"]
    server.succeed(resumed, go_on, ranks=ranks)
    assert_same(resumed, whole)


WIDE = ["--parallel.tensor", "2"]
SHARDED = ["--parallel.sharded_optimizer", "true"]
# (what decides the layout, ranks) of three parts of a run
MOVES = {
    "sharded": [([*WIDE, *SHARDED], 4), (["--parallel.pipeline", "2", *SHARDED], 2), (WIDE, 4)],
    "kinds": [([*WIDE, *SHARDED], 4), ([], 1), (SHARDED, 2)],
    "bf16": [([], 2), (SHARDED, 2), ([], 2)],
}


@pytest.mark.parametrize("name", MOVES)
def test_optimiser_state_moves_between_layouts_and_kinds(
    server: Server, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    """Sharded and plain, one layout to another and on to a third, against one run alone."""
    arguments = [*corpus.arguments(), "--policy.name", "dwm", "--training.steps", "12"]
    # In bf16 another order of sums is seen at once, so there the layout stays and only kinds move,
    # without clipping: a sharded optimiser adds up the gradient's norm in an order of its own.
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


@pytest.mark.parametrize(
    ("group", "policy", "refused"),
    [("micro_batch", "dwm", True), ("global", "dwm", False), ("micro_batch", "uniform", False)],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_group_of_weights_may_not_change(
    group: str, policy: str, refused: bool, frozen: bool
) -> None:
    """A micro-batch is what learned weights are normalised over, where weighting.group says so."""
    weighting = WeightingConfig(group=group, frozen=frozen)
    old = Config(policy=PolicyConfig(name=policy), weighting=weighting)
    new = replace(old, training=replace(old.training, micro_batch_size=2))
    with pytest.raises(UserError, match="micro_batch_size") if refused else nullcontext():
        refuse_changes(old, new, Path("run"))


def test_a_rate_may_change_and_a_decay_when_it_is_allowed() -> None:
    """The rate because what stops a run over its weights advises a smaller one."""
    old = Config(policy=PolicyConfig(name="dwm"))
    slower = replace(old, weighting=WeightingConfig(learning_rate=1e-5))
    refuse_changes(old, slower, Path("run"))
    decaying = replace(old, weighting=WeightingConfig(weight_decay=0.1))
    with pytest.raises(UserError, match="allow_changed weighting.weight_decay"):
        refuse_changes(old, decaying, Path("run"))
    allowed = replace(old.run, allow_changed=["weighting.weight_decay"])
    refuse_changes(old, replace(decaying, run=allowed), Path("run"))


class _Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


@pytest.mark.parametrize("name", ["llm/.metadata", "llm/common.pt", "training.pt"])
@pytest.mark.parametrize("use", ["resume", "init_from"])
def test_a_harmful_checkpoint_runs_nothing(
    server: Server,
    corpus: Corpus,
    stopped: tuple[Path, list[str], Path],
    tmp_path: Path,
    name: str,
    use: str,
) -> None:
    """Its manifest fits, as one who means harm would see to."""
    if (name, use) == ("training.pt", "init_from"):
        pytest.skip("init_from does not read it")
    run_dir, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(stopped[0], run_dir)
    checkpoint = list_checkpoints(run_dir)[-1]
    payload = _Payload(marker)
    if name.endswith(".pt"):
        torch.save({"model": payload, "state": payload}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(payload))
    manifest = read_manifest(checkpoint)
    files = {**manifest.files, name: record_file(checkpoint / name)}
    write_manifest(checkpoint, replace(manifest, files=files))
    assert pickle.loads(pickle.dumps(_Payload(tmp_path / "proof"))) == 0
    assert (tmp_path / "proof").exists(), "the payload does what it says"
    if use == "resume":
        job = server.run(run_dir, stopped[1])
    else:
        init = ["--model.init_from", str(checkpoint), "--training.steps", "1"]
        job = server.run(tmp_path / "new", [*corpus.arguments(), *init])
    assert job.codes == [2] and not marker.exists(), job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert str(checkpoint) in line and "Traceback" not in job.text
    assert "nothing of it was run" in line and "weights_only" not in job.text


def _checkpoint(run_dir: Path, step: int, updates: int = 0) -> Path:
    state = TrainState(step=step, stage_updates=updates, mean_loss=0.1 + 0.2)
    directory = checkpoint_dir(run_dir, state)
    directory.mkdir(parents=True)
    (directory / "file").write_bytes(b"123456789")
    # The check value of CRC-32 for these nine bytes, as its specifications give it.
    record = FileRecord(bytes=9, crc32="cbf43926")
    assert record_file(directory / "file") == record and zlib.crc32(b"123456789") == 0xCBF43926
    write_manifest(directory, Manifest(state=state, fingerprint={"a": "b"}, files={"file": record}))
    assert read_manifest(directory).state == state
    return directory


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        _checkpoint(tmp_path, step)
    _checkpoint(tmp_path, 8, updates=3)
    remove_old(tmp_path, keep_last=0, keep_every=0)
    assert len(list_checkpoints(tmp_path)) == 6
    remove_old(tmp_path, keep_last=2, keep_every=4)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step_00000004", "step_00000008", "step_00000008_update_00000003"] + [
        "step_00000010"
    ]
    remove_old(tmp_path, keep_last=1, keep_every=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010"]


def test_a_replaced_checkpoint_is_there_until_the_new_one_is(tmp_path: Path) -> None:
    """Whatever a kill leaves between the renames, the next start finds one of the two."""
    final = _checkpoint(tmp_path, 5)
    partial = final.with_name(final.name + ".partial")
    shutil.copytree(final, partial)
    (partial / "newer").touch()
    shutil.copytree(tmp_path, tmp_path.with_name("killed"))
    replace_folder(partial, final)
    assert (final / "newer").exists() and [p.name for p in final.parent.iterdir()] == [final.name]
    killed = tmp_path.with_name("killed") / "checkpoints"
    (killed / final.name).rename(killed / f"{final.name}.replaced")
    tidy(killed.parent)
    assert [p.name for p in killed.iterdir()] == [final.name]
    assert not (killed / final.name / "newer").exists()
