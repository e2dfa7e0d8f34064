"""`start` and `close` do what `bring_up` does, without a block, as often as a notebook likes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import run_ranks

REPOSITORY = Path(__file__).parent.parent.parent
LIMIT_S = 120
LOSSES = "tests.runtime.workers:losses"


@pytest.mark.parametrize("pipeline", [1, 2])
def test_it_trains_as_in_a_block(pipeline: int) -> None:
    cases = [{"pipeline": pipeline, "in_a_block": in_a_block} for in_a_block in (False, True)]
    started, in_a_block = run_ranks(
        "tests.runtime.workers:losses", pipeline, cases, limit_s=LIMIT_S
    )
    assert started == in_a_block


def test_one_process_may_start_again() -> None:
    case = {"pipeline": 1, "in_a_block": False}
    first, again = run_ranks(LOSSES, 1, [case, case], limit_s=LIMIT_S)
    assert first == again


def _python(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S)


def test_a_second_start_says_what_to_do() -> None:
    done = _python("from megatron_dwm.runtime import start; start(); start()")
    assert done.returncode == 1
    assert "UserError: torch.distributed is initialized already: call close()" in done.stderr


def test_python_closes_at_its_end() -> None:
    done = _python(
        "import atexit, torch\n"
        "from megatron_dwm.runtime import start\n"
        # Called after the one that start registers.
        "atexit.register(lambda: print(torch.distributed.is_initialized()))\n"
        "runtime = start()\n"
        "print(torch.distributed.is_initialized())\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nFalse\n", "")


def test_the_lines_of_the_document_work() -> None:
    text = (REPOSITORY / "docs" / "library.md").read_text(encoding="utf-8")
    [block] = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "start(seed" in b]
    done = _python(block + "print(loss)")
    assert done.returncode == 0, done.stderr
    assert 0.0 < float(done.stdout) < 10.0
