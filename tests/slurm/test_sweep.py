"""A task of an array trains the run of the sweep that its number names; without a Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.forking.client import REPOSITORY

LIMIT_S = 60
RATE = "weighting.learning_rate"
SWEEP = ["--seeds", "1,2", f"--{RATE}", "1e-3,3e-3", "--data.tokenizer", "a b.model"]


def _task(
    folder: Path, number: int, last: int, config: str = "examples/tiny.yaml"
) -> subprocess.CompletedProcess[str]:
    """Run the job's script as a task; `python` notes its arguments and says: finished."""
    (folder / "bin").mkdir(exist_ok=True)
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" >{folder}/words\n")
    python.chmod(0o755)
    site = folder / "site.sh"
    text = (REPOSITORY / "slurm" / "site.sh").read_text()
    for old, new in (
        ("DWM_ACCOUNT=\n", "DWM_ACCOUNT=none\n"),
        ("$PWD/", f"{folder}/"),
        ("DWM_MIN_FREE_GB=20", "DWM_MIN_FREE_GB=0"),
    ):
        text = text.replace(old, new)
    site.write_text(f"{text}\ndwm_environment() {{ PATH={folder}/bin:$PATH; }}\n")
    job = {
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "sweep", "SLURM_JOB_NODELIST": "n1"},
        **{"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_MAX": str(last)},
        **{"SLURM_SUBMIT_DIR": str(REPOSITORY), "DWM_SITE": str(site)},
    }
    command = ["bash", "slurm/sweep.sbatch", config, str(folder / "out"), *SWEEP]
    return subprocess.run(
        command,
        env={**os.environ, **job},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_every_task_has_a_run_of_its_own(tmp_path: Path) -> None:
    found = []
    for number in range(4):
        done = _task(tmp_path, number, last=3)
        assert done.returncode == 0 and "nothing to do" in done.stdout, done.stderr
        words = (tmp_path / "words").read_text().splitlines()
        assert words[1] == "examples/tiny.yaml" and "a b.model" in words
        rate, seed = words[words.index(f"--{RATE}") + 1], words[-1]
        assert words[-3] == f"{tmp_path}/out/{RATE}={rate}.{seed}"
        found.append((rate, seed))
    assert found == [("1e-3", "1"), ("1e-3", "2"), ("3e-3", "1"), ("3e-3", "2")]


def test_an_array_of_more_tasks_than_runs_is_one_line(tmp_path: Path) -> None:
    done = _task(tmp_path, 2, last=4)
    assert done.returncode == 2
    assert done.stderr == (
        "error: sweep: --array goes to 4, and there are 4 runs; use --array=0-3\n"
    )


def test_a_changed_configuration_is_another_sweep(tmp_path: Path) -> None:
    """Else finished runs of the old one would be taken for the new one's."""
    config = tmp_path / "mine.yaml"
    config.write_text((REPOSITORY / "examples" / "tiny.yaml").read_text())
    assert _task(tmp_path, 0, last=3, config=str(config)).returncode == 0
    config.write_text(config.read_text() + "# changed\n")
    done = _task(tmp_path, 1, last=3, config=str(config))
    assert done.returncode == 2 and "has runs of another configuration" in done.stderr
