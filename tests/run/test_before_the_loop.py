"""Signals, a held run directory and a user's mistakes before a run's first step."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.forking.client import fork_server
from tests.small_runs.command import metrics, pretrain
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import LIMIT_S, Job, Server
from tests.small_runs.progress import wait_for_step


def _codes(job: Job) -> list[int]:
    """How the ranks ended, waited for one by one: none is killed because another has failed."""
    job.codes = [fork_server().wait([pid], LIMIT_S).codes[0] for pid in job.pids]
    return job.codes


STOPS = [
    ("checking", signal.SIGUSR2),
    ("resuming", signal.SIGTERM),
    ("building", signal.SIGTERM),
    ("building", signal.SIGUSR1),
    ("loading", signal.SIGUSR2),
]


@pytest.mark.parametrize(("place", "number"), STOPS, ids=str)
def test_before_the_loop_a_signal_ends_the_process_and_loses_nothing(
    server: Server,
    stopped: tuple[Path, list[str], Path],
    tmp_path: Path,
    place: str,
    number: signal.Signals,
) -> None:
    """The main process of two gets it; the other says who has ended, and leaves with 1."""
    run_dir = tmp_path / "run"
    shutil.copytree(stopped[0], run_dir)
    fault = {"name": "send_signal", "place": place, "call": 1, "number": number, "rank": 0}
    arguments = [*stopped[1], "--parallel.timeout_s", "3"]
    job = server.start(run_dir, arguments, ranks=2, fault=fault)
    assert _codes(job) == [-number, 1], job.text
    assert "Traceback" not in job.text and "stopped at" not in job.text
    expected = "from rank 0" if place == "checking" else "rank 0 on"
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert expected in line and socket.gethostname() in line
    server.succeed(run_dir, arguments, ranks=2)
    assert [line["step"] for line in metrics(run_dir, "train")] == [1, 2, 3]


def test_all_ranks_leave_a_run_directory_that_is_held(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """With 2, by themselves, and one of them says why."""
    first = server.start(
        tmp_path / "run", corpus.arguments(), fault={"name": "slow_steps", "seconds": 0.5}
    )
    wait_for_step(first, tmp_path / "run", 1)
    arguments = [*corpus.arguments(), "--run.resume", "true"]
    second = server.start(tmp_path / "run", arguments, ranks=2)
    assert _codes(second) == [2, 2]
    assert second.text.count("another process is training") == 1, second.text
    assert len([s for s in second.text.splitlines() if "warning" not in s]) == 1, second.text
    first.kill()


def test_torchruns_report_ends_with_the_mistakes_line(corpus: Corpus, tmp_path: Path) -> None:
    arguments = [*corpus.arguments(), "--training.global_batch_size", "7"]
    done = pretrain(tmp_path / "run", *arguments, processes=2, fresh=True)
    assert done.returncode == 1  # torchrun's own, whatever its processes leave with
    lines = [line for line in done.stderr.splitlines() if line.strip("=")]
    [said] = [line for line in lines if line.startswith("error: ")]
    assert "training.global_batch_size" in said
    assert lines[-1] == f"  traceback : {said}"
    assert "exitcode  : 2 " in done.stderr


def test_a_mistake_on_another_machine_is_named_there(corpus: Corpus, tmp_path: Path) -> None:
    """The first rank of the second machine lacks a file that the main one may have."""
    environment = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    log = tmp_path / "log"
    command = ["-m", "megatron_dwm.pretrain", "--run.dir", str(tmp_path / "run")]
    command += [*corpus.arguments(), "--data.train", str(tmp_path / "missing")]
    pid = fork_server().start(command, stdout=log, stderr=log, environment=environment)
    assert fork_server().wait([pid], LIMIT_S).codes == [2]
    [line] = [s for s in log.read_text().splitlines() if s.startswith("error: ")]
    assert line.startswith(f"error: rank 1 on {socket.gethostname()}: ") and "missing" in line
