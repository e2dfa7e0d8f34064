"""Starting pretrain as users do, and reading what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
