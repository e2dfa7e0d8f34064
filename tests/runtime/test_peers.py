"""Peers that die, hang or never start, in real processes: one line names them, exit code 1."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forking.client import fork_server, rank_environments

LIMIT_S = 60.0
HOST = socket.gethostname()


@dataclass(frozen=True)
class Job:
    """The ranks of a program that runs; pids and logs by rank."""

    pids: dict[int, int]
    folder: Path

    def text(self, rank: int) -> str:
        """Returns the output of a rank."""
        return (self.folder / f"{rank}.log").read_text()

    def codes(self, *ranks: int) -> list[int]:
        """Waits for ranks one by one and returns their codes; a failure does not end the others."""
        return [fork_server().wait([self.pids[rank]], LIMIT_S).codes[0] for rank in ranks]


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    jobs: list[Job] = []

    def begin(program: str, size: int, *options: str, ranks: list[int] | None = None) -> Job:
        environments = rank_environments(size)
        pids = {
            rank: fork_server().start(
                ["-m", "tests.runtime.peer_workers", program, str(tmp_path), *options],
                stdout=tmp_path / f"{rank}.log",
                stderr=tmp_path / f"{rank}.log",
                environment=environments[rank],
            )
            for rank in (range(size) if ranks is None else ranks)
        }
        jobs.append(Job(pids, tmp_path))
        deadline = time.monotonic() + LIMIT_S
        while not all((tmp_path / str(rank)).exists() for rank in pids):
            assert time.monotonic() < deadline, [jobs[-1].text(rank) for rank in pids]
            time.sleep(0.01)
        return jobs[-1]

    yield begin
    for job in jobs:
        for pid in job.pids.values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.mark.parametrize(
    ("program", "size", "dead"),
    [
        ("reduce_for_ever", 2, 0),
        ("reduce_for_ever", 2, 1),
        ("reduce_for_ever", 4, 2),
        ("send_on", 4, 0),
        ("send_on", 4, 1),
    ],
)
def test_a_dead_peer_is_named_in_one_line(start: Start, program: str, size: int, dead: int) -> None:
    """All survivors print one line together; with rank 0 the job's store dies, too."""
    job = start(program, size)
    os.kill(job.pids[dead], signal.SIGKILL)
    others = [rank for rank in range(size) if rank != dead]
    assert job.codes(*others) == [1] * len(others)
    assert job.codes(dead) == [-signal.SIGKILL]
    lines = [line for rank in others for line in job.text(rank).splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: rank {dead} on {HOST} does not answer: its process has ")
    assert lines[0].endswith(" s ago"), lines


def test_two_dead_peers_are_named_together(start: Start) -> None:
    job = start("reduce_for_ever", 4)
    for dead in (1, 3):  # stopped first, so that neither is seen to be alive without the other
        os.kill(job.pids[dead], signal.SIGSTOP)
    for dead in (1, 3):
        os.kill(job.pids[dead], signal.SIGKILL)
    assert job.codes(0, 2) == [1, 1]
    text = job.text(0) + job.text(2)
    assert text.startswith(f"error: ranks 1, 3 on {HOST} do not answer"), text


def test_a_peer_that_hangs_is_named_after_the_time_limit(start: Start) -> None:
    job = start("reduce_for_ever", 2, "2")
    os.kill(job.pids[1], signal.SIGSTOP)
    assert job.codes(0) == [1]
    [line] = job.text(0).splitlines()
    assert f"(parallel.timeout_s) from rank 1 on {HOST}, though every process is alive" in line


def test_a_peer_that_never_comes_is_named(start: Start) -> None:
    # On a busy machine one of the two may start some seconds after the other.
    job = start("come", 4, "8", ranks=[0, 2])
    assert job.codes(0, 2) == [1, 1]
    [line] = (job.text(0) + job.text(2)).splitlines()
    assert line.startswith("error: ranks 1, 3 of 4 did not start within 8 s (parallel.timeout_s)")


def test_without_rank_0_its_address_is_named(start: Start) -> None:
    job = start("come", 2, "1", ranks=[1])
    assert job.codes(1) == [1]
    [line] = job.text(1).splitlines()
    assert line.startswith(f"error: rank 1 on {HOST}: no answer for 1 s (parallel.timeout_s)")
    assert "127.0.0.1:" in line and "MASTER_ADDR" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_a_peer_obeys_signals_at_once(
    start: Start, rank: int, number: signal.Signals
) -> None:
    """The time limit is ten minutes; the signal ends the process long before."""
    job = start("come", 2, "600", ranks=[rank])
    time.sleep(0.5)
    os.kill(job.pids[rank], number)
    assert job.codes(rank) == [-number]


def test_a_rank_that_fails_by_itself_says_so_and_the_others_are_quiet(start: Start) -> None:
    job = start("one_fails", 4)
    assert job.codes(0, 1, 2, 3) == [1, 1, 1, 1]
    assert "AssertionError: an error of rank 1" in job.text(1)
    assert [job.text(rank) for rank in (0, 2, 3)] == ["", "", ""]
