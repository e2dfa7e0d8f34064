"""What tools/run_status.py says of a run directory, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.checkpoint.manifest import Manifest, checkpoint_dir, write_manifest
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.files.run_names import STOPPED
from tests.forking.client import run_python


def _status(run_dir: Path, *options: str) -> tuple[int, str]:
    done = run_python(
        ["tools/run_status.py", "--run.dir", str(run_dir), "--training.steps", "40", *options]
    )
    return done.returncode, done.stdout.strip() or done.stderr.strip()


@pytest.mark.parametrize(
    ("step", "evaluated", "options", "code", "end"),
    [
        (20, 0, (), 3, "not finished"),
        (40, 0, (), 0, "finished"),
        (40, 30, ("--evaluation.path", "x.jsonl"), 3, "not finished"),
        (40, 40, ("--evaluation.path", "x.jsonl"), 0, "finished"),
        (50, 0, (), 0, "finished"),
    ],
)
def test_the_newest_checkpoint_decides(
    tmp_path: Path, step: int, evaluated: int, options: tuple[str, ...], code: int, end: str
) -> None:
    for at in (10, step):
        state = TrainState(step=at, evaluated_step=evaluated)
        directory = checkpoint_dir(tmp_path, state)
        directory.mkdir(parents=True)
        write_manifest(directory, Manifest(state=state, fingerprint={}, files={}))
    checkpoint_dir(tmp_path, TrainState(step=99)).mkdir()  # without a manifest it does not count
    line = f"{tmp_path}: checkpoint step_{step:08d}, of 40 steps: {end}"
    assert _status(tmp_path, *options) == (code, line)


def test_without_a_checkpoint_and_with_a_mistake(tmp_path: Path) -> None:
    assert _status(tmp_path) == (3, f"{tmp_path}: checkpoint none, of 40 steps: not finished")
    (tmp_path / STOPPED).touch()
    ended = f"{tmp_path}: checkpoint none, of 40 steps: not finished; the file stop ended it"
    assert _status(tmp_path) == (4, ended)
    code, line = _status(tmp_path, "--training.stepz", "3")
    assert code == 2 and line.startswith("error: ") and "stepz" in line
