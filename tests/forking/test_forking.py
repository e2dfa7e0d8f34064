"""Forked processes behave like fresh interpreters, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forking.client import REPOSITORY, ForkServer, run_python

PROGRAM = "tests/forking/program.py"
ALIKE = ["by itself", "0", "3", "259", "-1", "words", "nothing", "error", "interrupt", "terminate"]
ALIKE += ["at once", "warning", "torch"]
OWN = {"TEST_OF_FORKS": "a value"}


def fresh(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the same call in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **OWN},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def own_lines(stderr: str) -> list[str]:
    """Returns the output, without stack frames and the output of libraries on import."""
    return [line for line in stderr.splitlines() if "words" in line or "Error" in line]


@pytest.mark.parametrize("how", ALIKE)
def test_a_script_sees_and_ends_as_in_a_fresh_interpreter(how: str, tmp_path: Path) -> None:
    command = [str(REPOSITORY / PROGRAM), how, "--more", "a b"]
    forked, expected = run_python(command, environment=OWN, cwd=tmp_path), fresh(command, tmp_path)
    assert forked.returncode == expected.returncode
    ours, theirs = forked.stdout.splitlines(), expected.stdout.splitlines()
    if theirs:  # nothing is flushed by a signal
        assert json.loads(ours[0]) == json.loads(theirs[0])
    assert ours == theirs
    assert own_lines(forked.stderr) == own_lines(expected.stderr)
    assert ("beware" in forked.stderr) == (how == "warning") == ("beware" in expected.stderr)


def test_a_module_sees_what_it_does_in_a_fresh_interpreter() -> None:
    command = ["-m", "tests.forking.program", "3"]
    forked, expected = run_python(command, environment=OWN), fresh(command, REPOSITORY)
    assert forked.returncode == expected.returncode == 3
    assert forked.stdout == expected.stdout


def test_a_fresh_interpreter_is_one(tmp_path: Path) -> None:
    command = [str(REPOSITORY / PROGRAM), "modules"]
    asked, expected = (
        run_python(command, environment=OWN, cwd=tmp_path, fresh=True),
        fresh(command, tmp_path),
    )
    assert asked.stdout == expected.stdout and "False" in asked.stdout.splitlines()
    assert "True" in run_python(command).stdout.splitlines()


def test_forks_draw_different_numbers() -> None:
    first, second = (run_python([PROGRAM, "draws"]).stdout.splitlines()[1] for _ in range(2))
    pairs = zip(json.loads(first), json.loads(second), strict=True)
    assert all(one != other for one, other in pairs)


def test_a_rank_that_fails_ends_the_others_and_a_limit_ends_all() -> None:
    assert run_python([PROGRAM, "rank 0 fails"], ranks=3).returncode == 5
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_python([PROGRAM, "sleep"], ranks=2, limit_s=1)
    assert caught.value.output.count("argv") == 2
    assert run_python([PROGRAM, "3"]).returncode == 3, "the server goes on"


def alive(pid: int) -> bool:
    """True if the process runs; one that ended without being waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int]) -> bool:
    """True if all end within some seconds."""
    for _ in range(1000):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_outlives_the_server(tmp_path: Path) -> None:
    server = ForkServer(modules=())
    out = tmp_path / "out"
    pids = [server.start([PROGRAM, "sleep"], stdout=out, stderr=out) for _ in range(2)]
    assert all(map(alive, pids))
    os.kill(server.pid, signal.SIGKILL)
    assert gone([server.pid, *pids])
    with pytest.raises((RuntimeError, BrokenPipeError)):
        server.start([PROGRAM, "3"], stdout=out, stderr=out)


KILLED = """
import sys
from pathlib import Path
from tests.forking.client import ForkServer
out, program = sys.argv[1:]
server = ForkServer(modules=())
pid = server.start([program, "sleep"], stdout=Path(out), stderr=Path(out))
print(server.pid, pid, flush=True)
server.wait([pid], 60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_outlives_a_killed_pytest(tmp_path: Path) -> None:
    """A process that uses the server as pytest does is killed while it waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "out"), PROGRAM],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    process.kill()
    process.communicate()
    assert gone(pids)
