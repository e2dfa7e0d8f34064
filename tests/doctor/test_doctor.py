"""The doctor as a user runs it, under layouts, and on a hypergradient that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
LIMIT_S = 150


def _doctor(*arguments: str, processes: int = 1, program: str = "") -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    target = [program] if program else ["-m", "megatron_dwm.doctor"]
    command = [sys.executable, *(launcher if processes > 1 else []), *target, *arguments]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.mark.parametrize(
    ("arguments", "processes"),
    [
        ([], 1),
        (["examples/tiny.yaml", "--parallel.tensor", "2", "--parallel.sequence", "true"], 2),
        (["--parallel.pipeline", "2", "--bilevel.inner_optimizer", "sgd"], 2),
        (["--parallel.tensor", "2", "--parallel.pipeline", "2"], 4),
    ],
    ids=str,
)
def test_reports_and_agrees(arguments: list[str], processes: int) -> None:
    done = _doctor(*arguments, "--data.sequence_length", "32", processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "torch",
        "NVIDIA apex",
        "Adam",
        "gradient fusion",
        "bf16",
        "fp8",
        "open files",
        "shared memory",
        "layout",
    ):
        assert word in done.stdout
    assert "agrees with finite_difference" in done.stdout
    assert ("agrees with unroll" in done.stdout) == (processes == 1)


def test_a_wrong_hypergradient_is_found(tmp_path: Path) -> None:
    """A probe that leaves out the layers of one class."""
    program = tmp_path / "program.py"
    program.write_text(
        "import runpy, sys\n"
        "import megatron_dwm.bilevel.tangent_probe as probe\n"
        "real = probe._hook_for\n"
        "skip = ('ColumnParallelLinear',)\n"
        "probe._hook_for = lambda module, *rest: (\n"
        "    None if type(module).__name__ in skip else real(module, *rest)\n"
        ")\n"
        "sys.argv = ['doctor', *sys.argv[1:]]\n"
        "runpy.run_module('megatron_dwm.doctor', run_name='__main__')\n"
    )
    done = _doctor("--data.sequence_length", "32", program=str(program))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DISAGREES WITH finite_difference" in done.stdout


def test_mistakes_are_one_line() -> None:
    done = _doctor("--parallel.tensor", "3")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: parallel.tensor 3")
