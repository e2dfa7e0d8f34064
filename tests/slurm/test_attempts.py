"""What a job does after an attempt of its run, with Slurm's commands replaced by stubs."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_dwm.checkpoint.manifest import Manifest, checkpoint_dir, write_manifest
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.files.run_names import STOPPED
from tests.forking.client import REPOSITORY

pytestmark = pytest.mark.timeout(120)

TINY = str(REPOSITORY / "examples" / "tiny.yaml")
RUNNING = "JobId=7 JobState=RUNNING Reason=None PreemptTime=None Restarts=0 x"
CANCELLED = RUNNING.replace("RUNNING", "COMPLETING")
OWN = f"stuck {REPOSITORY} pretrain.sbatch {TINY}"


@dataclass(frozen=True)
class Job:
    """A job of pretrain.sbatch whose ranks end with a code."""

    folder: Path

    def stub(self, name: str, text: str) -> None:
        """Replace a program by a script."""
        file = self.folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)

    def attempt(
        self,
        code: int,
        shown: str = RUNNING,
        pending: str = "",
        number: int = 0,
        work: str = "",
        **more: str,
    ) -> str:
        """One attempt of the job; returns what it printed, and its exit code at the end.

        work: what the ranks do. more: variables of the job's environment.
        """
        self.stub("srun", f"{work or 'true'}; exit {code}")
        self.stub("squeue", f'[[ "$*" == *PENDING* ]] && echo "{pending}" || echo "{OWN}"')
        show = f'[ "$1" = requeue ] || {{ echo "{shown}"; exit; }}'
        self.stub(
            "scontrol", f'{show}; echo "requeue $2" >>"{self.folder}/said"; kill $PPID; sleep 1'
        )
        job = {
            **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "stuck", "SLURM_JOB_NODELIST": "n1"},
            **{"SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(REPOSITORY)},
            **{"SLURM_RESTART_COUNT": str(number), "DWM_SITE": str(self.folder / "site.sh")},
            **more,
        }
        done = subprocess.run(
            ["bash", "slurm/pretrain.sbatch", TINY, "--run.dir", str(self.folder / "run")],
            env={**os.environ, **job},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        return f"{done.stdout}{done.stderr}{done.returncode}"

    @property
    def requeued(self) -> bool:
        """True if an attempt has requeued the job."""
        return (self.folder / "said").exists()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    text = (REPOSITORY / "slurm" / "site.sh").read_text()
    text = text.replace("DWM_ACCOUNT=\n", "DWM_ACCOUNT=none\n").replace("$PWD/", f"{tmp_path}/")
    text = text.replace("DWM_MIN_FREE_GB=20", "DWM_MIN_FREE_GB=0")
    text += f"\ndwm_environment() {{ PATH={tmp_path}/bin:$PATH; }}\n"
    (tmp_path / "site.sh").write_text(text)
    return Job(tmp_path)


@pytest.mark.parametrize("code", [1, 137, 138])
def test_three_attempts_without_a_checkpoint_end_the_job(job: Job, code: int) -> None:
    """So a time limit that is shorter than the start is not tried for ever."""
    said = [job.attempt(code, number=number) for number in range(3)]
    assert "this job is requeued" in said[0] and "this job is requeued" in said[1]
    assert said[2].splitlines()[-2:] == [
        f"error: 3 attempts in a row without a new checkpoint, the last with exit code {code}",
        "1",
    ]


def test_a_job_that_its_user_cancels_does_not_come_back(job: Job) -> None:
    """Slurm has ended it, and the ranks have saved; a requeue would start it again."""
    assert "this job was cancelled: not requeued" in job.attempt(0, CANCELLED)
    assert not job.requeued


@pytest.mark.parametrize(
    "shown",
    [
        CANCELLED.replace("Reason=None", "Reason=TimeLimit"),
        CANCELLED.replace("Reason=None", "Reason=NodeDown"),
        CANCELLED.replace("PreemptTime=None", "PreemptTime=2026-11-25T21:20:04"),
        CANCELLED.replace("Restarts=0", "Restarts=1"),
    ],
)
def test_a_job_that_slurm_ends_goes_on(job: Job, shown: str) -> None:
    assert "this job is requeued" in job.attempt(0, shown)
    assert (job.folder / "said").read_text() == "requeue 7\n"


def test_the_next_job_of_the_same_run_goes_on(job: Job) -> None:
    assert "the next job of the chain goes on" in job.attempt(0, pending=f"8 {OWN}")
    assert not job.requeued


def test_a_waiting_task_of_the_same_array_is_no_link(job: Job) -> None:
    """Tasks of a sweep have one name, directory and command, and each its own run."""
    task = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "0"}
    assert "this job is requeued" in job.attempt(0, pending=f"8 {OWN}", **task)
    assert (job.folder / "said").read_text() == "requeue 6_0\n"


def test_a_waiting_job_of_the_same_name_is_no_link_if_its_run_is_another(job: Job) -> None:
    """Both have the name pretrain unless the user gives one."""
    other = OWN.replace("tiny", "large")
    assert "this job is requeued" in job.attempt(0, pending=f"8 {other}")


def test_a_run_without_an_error_shows_how_its_log_ends(job: Job) -> None:
    """A checkpoint that a full disk has no space for is a warning of the run."""
    log = job.folder / "logs" / "stuck-7" / "attempt_0" / "rank_0.log"
    log.parent.mkdir(parents=True)
    log.write_text("step 1\nwarning: No space left on device\n")
    assert "warning: No space left on device" in job.attempt(1)


def test_a_run_that_the_file_stop_ended_does_not_come_back(job: Job) -> None:
    """Until it is submitted again."""
    (job.folder / "run").mkdir()
    (job.folder / "run" / STOPPED).touch()
    said = job.attempt(0)
    assert "the file stop ended it: not requeued" in said and said.endswith("1")
    assert not job.requeued


def test_an_earlier_stop_does_not_hide_a_failure(job: Job) -> None:
    """The mark is there until a start has come far enough to remove it."""
    (job.folder / "run").mkdir()
    (job.folder / "run" / STOPPED).touch()
    said = [job.attempt(1, number=number) for number in range(3)]
    assert "exit code 1; this job is requeued" in said[0] and "error: 3 attempts" in said[2]


def test_the_ranks_get_the_whole_environment(job: Job) -> None:
    """After sbatch --export=LIST Slurm tells srun to give them the list alone."""
    said = job.attempt(1, work='echo "exports $SLURM_EXPORT_ENV"', SLURM_EXPORT_ENV="DWM_SITE")
    assert "exports ALL" in said


def test_the_file_stop_ends_a_chain(job: Job) -> None:
    (job.folder / "run").mkdir()
    (job.folder / "run" / STOPPED).touch()
    job.stub("scancel", f'echo "cancel $*" >>"{job.folder}/said"')
    assert job.attempt(0, pending=f"8 {OWN}").endswith("1")
    assert (job.folder / "said").read_text() == "cancel 8\n"


def test_a_finished_run_whose_ranks_end_badly_is_not_requeued(job: Job) -> None:
    """srun kills a rank that is a minute slower than the others, as with a slow upload."""
    state = TrainState(step=1000, evaluated_step=1000)
    directory = checkpoint_dir(job.folder / "run", state)
    work = f'mkdir -p "{directory.parent}"; mv "{job.folder}/done" "{directory}"; exit 137'
    (job.folder / "done").mkdir()
    write_manifest(job.folder / "done", Manifest(state=state, fingerprint={}, files={}))
    said = job.attempt(137, work=work)
    assert "finished, exit code of the ranks 137" in said and said.endswith("0"), said
    assert not job.requeued
