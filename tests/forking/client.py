"""Starts Python processes quickly, as forks of one server for every pytest process.

    done = run_python(["tools/report.py", "RUN"])               # as subprocess.run returns it
    done = run_python(["-m", "megatron_dwm.pretrain"], ranks=2)  # as two ranks of one job

A start costs some milliseconds instead of the seconds of the imports. A few tests of every command
set `fresh=True` and start it as users do: in a fresh interpreter, with ranks under torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
LIMIT_S = 150.0
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
# Modules that runs and preprocessing import; pyarrow, gigatoken and torch's optimizers import those
# of the second line. huggingface_hub and its users are left out, because they read the environment
# on import.
PRELOADED = (
    *("megatron_dwm.run.start", "megatron_dwm.preprocess.pipeline", "pytest"),
    *("pandas", "awkward", "scipy.optimize"),
)


@dataclass(frozen=True)
class Ended:
    """Exit codes of processes in order, negative for a signal. over: True if time ran out."""

    codes: list[int]
    over: bool


class ForkServer:
    """The server's process; use `fork_server()`."""

    def __init__(self, modules: Sequence[str] = PRELOADED) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forking.server", *modules],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C is for pytest, which ends this one
        )
        atexit.register(self.close)

    @property
    def has_ended(self) -> bool:
        """True if the server takes no more orders."""
        return self._process.poll() is not None

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def start(
        self,
        command: list[str],
        *,
        stdout: Path,
        stderr: Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path = REPOSITORY,
        fresh: bool = False,
    ) -> int:
        """Start `python COMMAND` in a new process; returns its id.

        environment: variables that differ from this process's.
        """
        order = {
            "command": command,
            "fresh": fresh,
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            "cwd": str(cwd),
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        return self._order(order)

    def wait(self, pids: list[int], limit_s: float) -> Ended:
        """Wait for the processes of one job; if one fails the others are ended, as by torchrun."""
        return Ended(**self._order({"wait": pids, "limit_s": limit_s}))

    def close(self) -> None:
        """End the server and all processes that it has started."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended before its last order
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        atexit.unregister(self.close)

    def _order(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BaseException:  # a time limit, Ctrl-C: the answer would be read for another's
            self.close()
            raise
        if not answer:
            self.close()
            self._log.seek(0)
            raise RuntimeError(f"the fork server has ended:\n{self._log.read()}")
        return json.loads(answer)


def fork_server() -> ForkServer:
    """Returns the server of this pytest process; the first test that needs it starts it."""
    if _started().has_ended:
        _started.cache_clear()
    return _started()


@functools.cache
def _started() -> ForkServer:
    return ForkServer()


def run_python(
    command: list[str],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: Path = REPOSITORY,
    ranks: int | None = None,
    fresh: bool = False,
    limit_s: float = LIMIT_S,
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND`, like `subprocess.run(..., capture_output=True, text=True)`.

    ranks: number of ranks of one job, which share the output; the exit code is that of the first
    rank that failed by itself. fresh: use a fresh interpreter, with ranks under torchrun. Raises
    `subprocess.TimeoutExpired`.
    """
    server, given = fork_server(), [{}]
    if ranks and fresh:
        command = [*TORCHRUN, "--nproc-per-node", str(ranks), *command]
    elif ranks:
        given = rank_environments(ranks)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        pids = [
            server.start(
                command,
                stdout=out,
                stderr=err,
                environment={**(environment or {}), **of_rank},
                cwd=cwd,
                fresh=fresh,
            )
            for of_rank in given
        ]
        ended = server.wait(pids, limit_s)
        texts = [path.read_text() if path.exists() else "" for path in (out, err)]
    if ended.over:
        raise subprocess.TimeoutExpired(command, limit_s, *texts)
    failed = [code for code in ended.codes if code]
    code = next((code for code in failed if code != -9), failed[0] if failed else 0)
    return subprocess.CompletedProcess(command, code, *texts)


def rank_environments(ranks: int, port: int | None = None) -> list[dict[str, str]]:
    """Returns the variables that torchrun sets for every rank of a job on one machine."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_ports(1)[0])}
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), **sizes, **address} for rank in range(ranks)
    ]


def free_ports(count: int) -> list[int]:
    """Returns `count` ports that nothing listens on and that no later call returns again.

    They lie below the range from which the system serves connections, and every worker of
    pytest-xdist has ports of its own: a port may wait for minutes before its case listens on it.
    """
    return list(itertools.islice(filter(_is_free, _own_ports()), count))


@functools.cache
def _own_ports() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = range(10_000, 30_000)[worker::workers]
    # Two pytest processes on one machine seldom start at the same port.
    first = random.Random().randrange(len(ports))
    return itertools.cycle([*ports[first:], *ports[:first]])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store binds
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True
