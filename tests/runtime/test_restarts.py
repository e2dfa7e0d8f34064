"""Processes that torchrun starts again meet, although its store remembers the ones before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dwm.config import UserError
from megatron_dwm.runtime.peers import meet
from tests.forking.client import REPOSITORY, free_ports

PROGRAM = """
import os
import torch
import torch.distributed as dist
from megatron_dwm.runtime.peers import meet

rank = int(os.environ["RANK"])
with meet(60) as (store, peers):
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.destroy_process_group()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os._exit(1 if rank else 0)
open(f"met_{rank}", "w").write(str(int(total)))
"""


@pytest.mark.timeout(180)
def test_the_second_attempt_meets(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--max-restarts", "1", "--master-port", str(free_ports(1)[0]), "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"met_{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


def test_restarts_on_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts its own, so the others would look for another attempt's keys."""
    several = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--max-restarts: expected 0 on several machines"), meet(1):
        raise AssertionError("it met")
