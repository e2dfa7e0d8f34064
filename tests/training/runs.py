"""Starting pretrain as users do, and reading what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
LIMIT_S = 150


def pretrain(run_dir: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run `megatron_dwm.pretrain` in one process, or under torchrun."""
    launcher = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + ["--nproc-per-node", str(processes)]
    )
    command = [*launcher, "-m", "megatron_dwm.pretrain", "--run.dir", str(run_dir), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )


def succeed(run_dir: Path, *arguments: str, processes: int = 1) -> None:
    """Run and fail the test with the output if it does not succeed."""
    done = pretrain(run_dir, *arguments, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr


def metrics(run_dir: Path, phase: str) -> list[dict[str, Any]]:
    """The lines of one phase."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["phase"] == phase]


def without_time(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl but for the clock."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def kill_after_checkpoint(run_dir: Path, arguments: list[str], processes: int) -> None:
    """Start a run and end it with SIGKILL once it has a checkpoint and has gone on from there."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    command = [sys.executable, *launcher, "-m", "megatron_dwm.pretrain", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--run.dir", str(run_dir)],
        cwd=REPOSITORY,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        if (run_dir / "checkpoints" / "step_00000006").is_dir() and _steps(run_dir) >= 8:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 8 <= _steps(run_dir) < 20, "the kill came too late to test anything"


def _steps(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_text().count('"phase": "train"') if file.is_file() else 0
