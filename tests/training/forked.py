"""Runs of several processes that start in a moment, to be killed, stopped and damaged by tests.

A server process imports everything once; every rank is a fork of it that calls `pretrain` with the
arguments of a user. So a rank costs what it trains, not the seconds of its imports.

    python -m tests.training.forked     reads one JSON order a line, answers with one JSON line
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
LIMIT_S = 240.0
_POLL_S = 0.005


@dataclass
class Job:
    """Ranks that are running. codes: how they ended, by rank; negative for a signal."""

    pids: list[int]
    log: Path
    server: Server
    codes: list[int | None] = field(default_factory=list)

    def wait(self) -> list[int | None]:
        """Wait for the end of all; as torchrun does, end the others when one fails."""
        self.codes = self.server.order({"wait": self.pids})
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
    """The process that forks."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forked"],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def order(self, order: dict[str, Any]) -> Any:
        """The server's answer to one order."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, run_dir: Path, arguments: list[str], *, ranks: int = 1, fault: dict | None = None
    ) -> Job:
        """Start a run. fault: the `name` of a function of faults.py, and its arguments."""
        self._count += 1
        log = self._folder / f"{self._count}.log"
        argv = [*arguments, "--run.dir", str(run_dir)]
        order = {"argv": argv, "ranks": ranks, "log": str(log), "fault": fault}
        return Job(self.order(order), log, self)

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
        """End the server."""
        self._process.kill()
        self._process.wait()


def _fork_rank(order: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(order["ranks"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with Path(order["log"]).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os._exit(_pretrain(order))


def _pretrain(order: dict[str, Any]) -> int:
    """Call pretrain as its command line does; its exit code."""
    from megatron_dwm.pretrain import main

    sys.argv = ["pretrain", *order["argv"]]
    try:
        if order["fault"]:
            arguments = dict(order["fault"])
            name = arguments.pop("name")
            getattr(importlib.import_module("tests.training.faults"), name)(**arguments)
        main()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _wait(pids: list[int]) -> list[int | None]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT_S
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > deadline:
            time.sleep(0.5)  # the others may be about to say the same
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return [codes[pid] for pid in pids]


def _main() -> None:
    importlib.import_module("megatron_dwm.training.run")
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = _wait(order["wait"])
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            answer = [_fork_rank(order, rank, port) for rank in range(order["ranks"])]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
