"""The doctor as a user runs it, under layouts, and on a hypergradient that is wrong."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dwm.config import Config, DataConfig, TrainingConfig
from megatron_dwm.doctor.borders import borders_finding
from megatron_dwm.model.passes import pipeline
from megatron_dwm.runtime import bring_up
from megatron_dwm.testing import TINY_MODEL
from tests.forking.client import run_python


def _doctor(*arguments: str, fresh: bool, processes: int = 1) -> subprocess.CompletedProcess[str]:
    command = ["-m", "megatron_dwm.doctor", *arguments]
    return run_python(command, ranks=processes if processes > 1 else None, fresh=fresh)


@pytest.mark.parametrize(
    ("arguments", "processes", "fresh"),
    [
        ([], 1, True),
        (["examples/tiny.yaml", "--parallel.tensor", "2", "--parallel.sequence", "true"], 2, True),
        (["--parallel.pipeline", "2", "--bilevel.inner_optimizer", "sgd"], 2, False),
        (["--parallel.tensor", "2", "--parallel.pipeline", "2"], 4, False),
        (["--parallel.tensor", "2", "--parallel.context", "2"], 4, False),
    ],
    ids=str,
)
def test_reports_and_agrees(arguments: list[str], processes: int, fresh: bool) -> None:
    length = ("--data.sequence_length", "32")
    done = _doctor(*arguments, *length, processes=processes, fresh=fresh)
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
    assert "do not change the loss of the next one" in done.stdout
    assert "agrees with finite_difference" in done.stdout
    assert ("agrees with unroll" in done.stdout) == (processes == 1)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--model.precision fp8", 0, "Transformer Engine's: "),
        (
            "--model.fp8_emulation true",
            0,
            "emulated_fp8 layers; the hypergradient is checked in fp32",
        ),
        ("--model.fp8_emulation true --model.fp8_recipe delayed", 2, "has tensorwise only"),
        ("--profiling.tool nvtx", 2, "needs a GPU"),
        ("--bilevel.estimator unroll --model.precision bf16 --policy.name dwm", 2, "needs model."),
    ],
)
def test_what_a_run_would_refuse_is_refused(arguments: str, code: int, words: str) -> None:
    done = _doctor(*arguments.split(), "--data.sequence_length", "32", fresh=False)
    assert done.returncode == code and words in done.stdout + done.stderr, done.stderr


def test_a_wrong_hypergradient_is_found(tmp_path: Path) -> None:
    """A probe that leaves out the layers of one class."""
    program = tmp_path / "program.py"
    program.write_text(
        "import runpy, sys\n"
        "import megatron_dwm.bilevel.probe_hooks as probe\n"
        "real = probe._hook_for\n"
        "skip = ('ColumnParallelLinear',)\n"
        "probe._hook_for = lambda name, module, *rest: (\n"
        "    None if type(module).__name__ in skip else real(name, module, *rest)\n"
        ")\n"
        "sys.argv = ['doctor', *sys.argv[1:]]\n"
        "runpy.run_module('megatron_dwm.doctor', run_name='__main__')\n"
    )
    done = run_python([str(program), "--data.sequence_length", "32"])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DISAGREES WITH finite_difference" in done.stdout


def test_mistakes_are_one_line() -> None:
    done = _doctor("--parallel.tensor", "3", fresh=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: parallel.tensor 3")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_that_ignore_borders_are_found(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(
        model=replace(TINY_MODEL, precision=precision),
        data=DataConfig(sequence_length=16),
        training=TrainingConfig(global_batch_size=4, micro_batch_size=2),
    )
    with bring_up(config.parallel, seed=1) as runtime:
        assert borders_finding(config, runtime)[0]
        monkeypatch.setattr(pipeline, "attention_borders", lambda *_: None)
        stops, finding = borders_finding(config, runtime)
    assert not stops and "CHANGE the loss of the next one" in finding
