"""Runs of several processes that start in a moment, to be killed, stopped and damaged by tests.

Every rank is a fork of tests/forking's server and calls `pretrain` with the arguments of a user,
after it has prepared the fault that the test wants.

    python -m tests.small_runs.forked FAULT [pretrain's arguments]     FAULT is JSON, or null
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.forking.client import fork_server, rank_environments

LIMIT_S = 240.0


@dataclass
class Job:
    """Ranks that are running. codes: how they ended, by rank; negative for a signal."""

    pids: list[int]
    log: Path
    codes: list[int] = field(default_factory=list)

    def wait(self) -> list[int]:
        """Wait for the end of all; as torchrun does, end the others when one fails."""
        self.codes = fork_server().wait(self.pids, LIMIT_S).codes
        return self.codes

    def kill(self) -> None:
        """SIGKILL to every rank, as when a machine dies."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        self.wait()

    @property
    def text(self) -> str:
        """What all ranks said."""
        return self.log.read_text(errors="replace")


class Server:
    """Starts runs; their output goes to files of the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs: list[Job] = []

    def start(
        self, run_dir: Path, arguments: list[str], *, ranks: int = 1, fault: dict | None = None
    ) -> Job:
        """Start a run. fault: the `name` of a function of faults.py, and its arguments."""
        log = self._folder / f"{len(self._jobs)}.log"
        command = ["-m", "tests.small_runs.forked", json.dumps(fault), *arguments]
        pids = [
            fork_server().start(
                [*command, "--run.dir", str(run_dir)],
                stdout=log,
                stderr=log,
                environment={**of_rank, "PYTHONWARNINGS": "ignore"},
            )
            for of_rank in rank_environments(ranks)
        ]
        self._jobs.append(Job(pids, log))
        return self._jobs[-1]

    def run(
        self, run_dir: Path, arguments: list[str], *, ranks: int = 1, fault: dict | None = None
    ) -> Job:
        """Start a run and wait for its end."""
        job = self.start(run_dir, arguments, ranks=ranks, fault=fault)
        job.wait()
        return job

    def succeed(
        self, run_dir: Path, arguments: list[str], *, ranks: int = 1, fault: dict | None = None
    ) -> Job:
        """Run; every rank has to end with 0."""
        job = self.run(run_dir, arguments, ranks=ranks, fault=fault)
        assert job.codes == [0] * ranks, f"{job.codes}\n{job.text}"
        return job

    def close(self) -> None:
        """End what still runs."""
        for job in self._jobs:
            if not job.codes:
                job.kill()


def _main() -> None:
    fault, *arguments = sys.argv[1:]
    prepared = json.loads(fault)
    if prepared:
        name = prepared.pop("name")
        getattr(importlib.import_module("tests.small_runs.faults"), name)(**prepared)
    from megatron_dwm.pretrain import main

    sys.argv = ["pretrain", *arguments]
    main()


if __name__ == "__main__":
    _main()
