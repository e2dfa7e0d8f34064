"""Programs of one rank whose peers die, hang or never start.

python -m tests.runtime.peer_workers PROGRAM FOLDER [TIMEOUT_S]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dwm.config import ParallelConfig
from megatron_dwm.entry import run_job
from megatron_dwm.runtime import bring_up


def reduce_for_ever(folder: Path, timeout_s: int) -> None:
    """Run one all-reduce after another, and write FOLDER/RANK after the first."""
    with bring_up(ParallelConfig(timeout_s=timeout_s), seed=1) as runtime:
        while True:
            dist.all_reduce(torch.ones(3))
            assert runtime.peers is not None
            runtime.peers.heard()
            (folder / str(runtime.rank)).touch()
            time.sleep(0.01)


def send_on(folder: Path, timeout_s: int) -> None:
    """Wait on rank r for rank r - 1, so that only one rank sees that a peer has ended."""
    with bring_up(ParallelConfig(timeout_s=timeout_s), seed=1) as runtime:
        before, after = runtime.rank - 1, (runtime.rank + 1) % runtime.world_size
        value = torch.ones(3)
        while True:
            if before >= 0:
                dist.recv(value, before)
            (folder / str(runtime.rank)).touch()
            time.sleep(0.01)
            if after:
                dist.send(value, after)


def one_fails(folder: Path, timeout_s: int) -> None:
    """End one rank by its own error while the others wait for it."""
    with bring_up(ParallelConfig(timeout_s=timeout_s), seed=1) as runtime:
        (folder / str(runtime.rank)).touch()
        if runtime.rank == 1:
            raise AssertionError("an error of rank 1")
        dist.all_reduce(torch.ones(3))


def come(folder: Path, timeout_s: int) -> None:
    """Wait for the other ranks to start."""
    (folder / os.environ["RANK"]).touch()
    with bring_up(ParallelConfig(timeout_s=timeout_s), seed=1):
        (folder / "all").touch()


def main() -> None:
    """Run a program in the way in which the package's commands run."""
    name, folder, *rest = sys.argv[1:]
    sys.argv = sys.argv[:1]
    timeout_s = int(rest[0]) if rest else 60
    run_job("peer_workers", lambda _: globals()[name](Path(folder), timeout_s))


if __name__ == "__main__":
    main()
