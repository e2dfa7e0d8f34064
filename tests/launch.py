"""Real multi-process tests from plain pytest: every rank is a process of its own, over gloo.

run_ranks("tests.bilevel.workers:probe", 4, [{"tensor": 2, "pipeline": 2}]) calls
`probe(tensor=2, pipeline=2)` in four processes and gives back what each returned. Starting a
process takes seconds, so one start serves many cases. A rank that fails, or a run past its time
limit, ends the others and fails the test with that rank's output.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent
_POLL_S = 0.05


def run_ranks(
    function: str, world_size: int, cases: list[dict[str, Any]], *, limit_s: float = 300.0
) -> list[list[Any]]:
    """For every case, what `module:function(**case)` returned in every rank, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        # A rendezvous address of its own for every case: the last one's may still be in use.
        ports = _free_ports(len(cases))
        numbered = [
            {"port": port, "arguments": case} for port, case in zip(ports, cases, strict=True)
        ]
        ranks = [
            _start(function, numbered, rank, world_size, Path(folder)) for rank in range(world_size)
        ]
        _wait(ranks, Path(folder), limit_s)
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]
        return [list(ranks) for ranks in zip(*results, strict=True)]


def _free_ports(count: int) -> list[int]:
    """Different ports below those that the system hands out: those may be taken by a connection of
    an earlier case before they are listened on.
    """
    found: list[int] = []
    for port in random.Random().sample(range(10_000, 30_000), 10 * count):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            break
    return found


def _start(
    function: str, cases: list[dict], rank: int, world_size: int, folder: Path
) -> subprocess.Popen:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "tests.launch", function, json.dumps(cases)]
    with (folder / f"{rank}.log").open("w") as log:
        return subprocess.Popen(
            [*command, str(folder / f"{rank}.pt")],
            env=environment,
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _wait(ranks: list[subprocess.Popen], folder: Path, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    try:
        while any(process.poll() is None for process in ranks):
            failed = [rank for rank, process in enumerate(ranks) if process.poll()]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        bad = [rank for rank, process in enumerate(ranks) if process.poll() != 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    if bad:
        failed = [rank for rank in bad if ranks[rank].returncode != -9] or bad
        log = (folder / f"{failed[0]}.log").read_text()
        pytest.fail(f"rank {failed[0]} of {len(ranks)} failed or ran over {limit_s} s:\n{log}")


def _main() -> None:
    name, cases, result = sys.argv[1:]
    module, function = name.split(":")
    call = getattr(importlib.import_module(module), function)
    values = []
    for case in json.loads(cases):
        os.environ["MASTER_PORT"] = str(case["port"])
        values.append(call(**case["arguments"]))
    torch.save(values, result)


if __name__ == "__main__":
    _main()
