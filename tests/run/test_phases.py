"""Checkpoints inside weighting phases, and the weighting model that a run leaves on its way."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same

OWN = ["--policy.name", "dwm", "--weighting.encoder", "own"]


def _sigkill(place: str, call: int) -> dict:
    return {
        "name": "send_signal",
        "place": place,
        "call": call,
        "number": signal.SIGKILL,
        "rank": 0,
    }


@pytest.fixture
def staged(corpus: Corpus) -> list[str]:
    """Two phases of five updates, at steps 2 and 4 of 6; a checkpoint every 2."""
    return [
        *corpus.arguments(),
        *OWN,
        *("--weighting.mode", "staged", "--weighting.stages", "3", "--training.steps", "6"),
        *("--weighting.updates_per_stage", "5", "--training.checkpoint_interval_steps", "2"),
    ]


def _reached(run_dir: Path) -> tuple[int, int]:
    """(step, updates of the phase) of the newest checkpoint."""
    state = read_manifest(list_checkpoints(run_dir)[-1]).state
    return state.step, state.stage_updates


def test_a_job_that_is_killed_in_every_phase_advances(
    server: Server, staged: list[str], tmp_path: Path
) -> None:
    """No start lives to see a whole phase; the run still ends, as the undisturbed one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    server.succeed(whole, staged)
    assert [path.name.removeprefix("step_0000000") for path in list_checkpoints(whole)] == [
        "2",
        *("2_update_00000002", "2_update_00000004"),
        "4",
        *("4_update_00000001", "4_update_00000003", "4_update_00000005"),
        "6",
    ]
    for expected in ((2, 2), (4, 0), (4, 3)):
        job = server.run(killed, [*staged, *RESUME], fault=_sigkill("weighting", 4))
        assert job.codes == [-signal.SIGKILL] and _reached(killed) == expected, job.text
    server.succeed(killed, [*staged, *RESUME])
    assert_same(killed, whole)


def test_without_an_interval_a_phase_saves_nothing(
    server: Server, staged: list[str], tmp_path: Path
) -> None:
    server.succeed(tmp_path / "run", [*staged, "--training.checkpoint_interval_steps", "0"])
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000006"]


@pytest.fixture
def online(corpus: Corpus) -> list[str]:
    """An update before steps 6, 9, 12 and on; a checkpoint every 4 steps."""
    return [*corpus.arguments(), *OWN, "--training.checkpoint_interval_steps", "4"]


def assert_model_of_checkpoint(run_dir: Path, checkpoint: Path) -> None:
    """The run's weighting model is there, whole, and the one that the checkpoint has."""
    directory = run_dir / "weighting" / "stage_1"
    assert json.loads((directory / "weighting.json").read_text())["encoder"] == "own"
    saved = torch.load(checkpoint / "training.pt", weights_only=True)["policy"]["model"]
    found = load_file(directory / "weighting.safetensors")
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_a_stopped_run_has_its_weighting_model(
    server: Server, corpus: Corpus, online: list[str], tmp_path: Path
) -> None:
    """Another run can start from it; so it is after kill -9, with the model of a checkpoint."""
    stop = {**_sigkill("training", 13), "number": signal.SIGTERM}
    server.succeed(tmp_path / "stopped", online, fault=stop)
    names = [path.name for path in list_checkpoints(tmp_path / "stopped")]
    assert names == [f"step_000000{step:02}" for step in (4, 8, 12, 13)]
    assert [line["step"] for line in metrics(tmp_path / "stopped", "weighting")] == [5, 8, 11]
    assert_model_of_checkpoint(tmp_path / "stopped", list_checkpoints(tmp_path / "stopped")[-1])
    job = server.run(tmp_path / "killed", online, fault=_sigkill("training", 11))
    assert job.codes == [-signal.SIGKILL], job.text
    assert_model_of_checkpoint(tmp_path / "killed", list_checkpoints(tmp_path / "killed")[-1])
    model = tmp_path / "killed" / "weighting" / "stage_1"
    load = ["--weighting.load", str(model), "--weighting.frozen", "true", "--training.steps", "1"]
    server.succeed(tmp_path / "other", [*corpus.arguments(), *OWN, *load])
    assert metrics(tmp_path / "other", "train")[0]["weight_std"] > 0.0


def test_a_kill_never_leaves_half_a_weighting_model(
    server: Server, online: list[str], tmp_path: Path
) -> None:
    """Killed before the first is in its place, and between the two files of a later one."""
    run_dir = tmp_path / "run"
    job = server.run(run_dir, online, fault=_sigkill("weighting model", 1))
    assert job.codes == [-signal.SIGKILL] and not (run_dir / "weighting" / "stage_1").exists()
    # At steps 4 (nothing has been learned), 8 and 12: two files each, but for the first.
    between = {"name": "kill_between_model_files", "call": 4}
    job = server.run(run_dir, [*online, *RESUME], fault=between)
    assert job.codes == [-signal.SIGKILL], job.text
    # The tensors may be of step 8 or of step 12, whose checkpoint was not begun; never half.
    found = load_file(run_dir / "weighting" / "stage_1" / "weighting.safetensors")
    newest = list_checkpoints(run_dir)[-1]
    assert newest.name == "step_00000008"
    saved = torch.load(newest / "training.pt", weights_only=True)["policy"]["model"]
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in saved.items()
    }
    server.succeed(run_dir, [*online, *RESUME])
    assert [path.name for path in (run_dir / "weighting").iterdir()] == ["stage_1"]
    assert_model_of_checkpoint(run_dir, list_checkpoints(run_dir)[-1])
