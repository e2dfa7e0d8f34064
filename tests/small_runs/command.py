"""Starting pretrain with a user's arguments, and reading what it leaves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.forking.client import fork_server, rank_environments, run_python

LIMIT_S = 150
RESUME = ["--run.resume", "true"]


def pretrain(
    run_dir: Path, *arguments: str, processes: int = 1, fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run `megatron_dwm.pretrain` in one process or several.

    fresh: as users do, in a fresh interpreter or under torchrun, instead of in forks.
    """
    return run_python(
        ["-m", "megatron_dwm.pretrain", "--run.dir", str(run_dir), *arguments],
        environment={"PYTHONWARNINGS": "ignore"},
        ranks=processes if processes > 1 else None,
        fresh=fresh,
        limit_s=LIMIT_S,
    )


def succeed(run_dir: Path, *arguments: str, processes: int = 1, fresh: bool = False) -> None:
    """Run and fail the test with the output if it does not succeed."""
    done = pretrain(run_dir, *arguments, processes=processes, fresh=fresh)
    assert done.returncode == 0, done.stdout + done.stderr


def metrics(run_dir: Path, phase: str) -> list[dict[str, Any]]:
    """The lines of one phase."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["phase"] == phase]


def without_time(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl but for the clock."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def scheduled_rate(
    step: int, *, steps: int, warm_up: int, peak: float, least: float = 0.1
) -> float:
    """The learning rate of a step, from 1, of a run with a cosine to a fraction of the peak."""
    if step <= warm_up:
        return peak * step / warm_up
    turn = math.pi * (step - warm_up) / (steps - warm_up)
    return peak * (least + (1 - least) * (1 + math.cos(turn)) / 2)


def kill_after_checkpoint(run_dir: Path, arguments: list[str], processes: int) -> None:
    """Start a run and end every rank with SIGKILL once it has gone on from a checkpoint.

    Not under torchrun: it starts its workers in sessions of their own, and they outlive its kill.
    """
    command = ["-m", "megatron_dwm.pretrain", *arguments, "--run.dir", str(run_dir)]
    server, log = fork_server(), run_dir.with_suffix(".log")
    pids = [
        server.start(command, stdout=log, stderr=log, environment=of_rank)
        for of_rank in rank_environments(processes)
    ]
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if (run_dir / "checkpoints" / "step_00000006").is_dir() and _steps(run_dir) >= 8:
            break
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert server.wait(pids, LIMIT_S).codes == [-signal.SIGKILL] * processes, log.read_text()
    assert 8 <= _steps(run_dir) < 20, "the kill came too late to test anything"


def _steps(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_text().count('"phase": "train"') if file.is_file() else 0
