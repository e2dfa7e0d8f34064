"""Real multi-process tests from plain pytest: every rank is a process of its own, over gloo.

run_ranks("tests.bilevel.workers:probe", 4, [{"tensor": 2, "pipeline": 2}]) calls
`probe(tensor=2, pipeline=2)` in four processes and gives back what each returned; they are forks of
tests/forking's server. A rank that fails, or a run past its time limit, ends the others and fails
the test with that rank's output.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forking.client import REPOSITORY, fork_server, free_ports, rank_environments

__all__ = ["REPOSITORY", "run_ranks"]


def run_ranks(
    function: str, world_size: int, cases: list[dict[str, Any]], *, limit_s: float = 300.0
) -> list[list[Any]]:
    """For every case, what `module:function(**case)` returned in every rank, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        # A rendezvous address of its own for every case: the last one's may still be in use.
        ports = free_ports(len(cases))
        numbered = [
            {"port": port, "arguments": case} for port, case in zip(ports, cases, strict=True)
        ]
        _run(function, json.dumps(numbered), world_size, Path(folder), limit_s)
        results = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]
        return [list(ranks) for ranks in zip(*results, strict=True)]


def _run(function: str, cases: str, world_size: int, folder: Path, limit_s: float) -> None:
    server = fork_server()
    logs = [folder / f"{rank}.log" for rank in range(world_size)]
    pids = [
        server.start(
            ["-m", "tests.launch", function, cases, str(folder / f"{rank}.pt")],
            stdout=log,
            stderr=log,
            environment={**of_rank, "PYTHONWARNINGS": "ignore"},
        )
        for rank, (log, of_rank) in enumerate(zip(logs, rank_environments(world_size), strict=True))
    ]
    codes = server.wait(pids, limit_s).codes
    bad = [rank for rank, code in enumerate(codes) if code]
    if bad:
        first = next((rank for rank in bad if codes[rank] != -signal.SIGKILL), bad[0])
        text = logs[first].read_text()
        pytest.fail(f"rank {first} of {world_size} failed or ran over {limit_s} s:\n{text}")


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
