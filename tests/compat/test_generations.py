"""Checkpoints move between two releases of Megatron-Core, which train alike.

`theirs` is the release that runs these tests (tests/compat/run.sh), `ours` that of .venv.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import megatron.core
import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from megatron_dwm.convert.from_hf import import_from_huggingface
from megatron_dwm.convert.to_hf import export_to_huggingface
from megatron_dwm.runtime import releases
from tests.forking.client import REPOSITORY, TORCHRUN
from tests.own_environment import kept_environment
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus

LIMIT_S = 240
OURS, THEIRS = str(REPOSITORY / ".venv" / "bin" / "python"), sys.executable
STEPS = 12
# Both releases add the same numbers; another order in one kernel, 1e-7 of a loss near 6, grows over
# twelve steps of Adam at 1e-3.
TOLERANCE = 2e-5
LAYOUTS = {
    "one process": ([], 1),
    "TP 2 and sequence parallel": (["--parallel.tensor", "2", "--parallel.sequence", "true"], 2),
    "PP 2": (["--parallel.pipeline", "2"], 2),
    "sharded": (["--parallel.sharded_optimizer", "true"], 2),
}


def test_the_release_is_the_one_asked_for() -> None:
    # A release may name its commit after its number.
    number, *_ = megatron.core.__version__.split("+")
    assert number == os.environ["MEGATRON_DWM_COMPAT"]
    command = [OURS, "-c", "import megatron.core as m; print(m.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=True)
    assert done.stdout.strip() != megatron.core.__version__


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_moves_there_and_back(corpus: Corpus, tmp_path: Path, layout: str) -> None:
    """Four steps under ours, four under theirs, four under ours, against one release's runs."""
    options, ranks = LAYOUTS[layout]
    arguments = _arguments(corpus, options)
    whole, other = tmp_path / "whole", tmp_path / "other"
    _train(OURS, whole, arguments, ranks)
    _train(THEIRS, other, arguments, ranks)
    _assert_alike(other, whole)
    _assert_alike(_moved(tmp_path, arguments, ranks), whole)


def test_a_run_moves_to_another_class_and_back(corpus: Corpus, tmp_path: Path) -> None:
    """The same with GPTModel under ours, HybridModel under theirs."""
    if not releases.has_hybrid_model():
        pytest.skip("this release has no HybridModel")
    options, ranks = LAYOUTS["PP 2"]
    arguments = _arguments(corpus, options)
    _train(OURS, tmp_path / "whole", arguments, ranks)
    moved = _moved(tmp_path, arguments, ranks, ["--model.builder", "hybrid"])
    _assert_alike(moved, tmp_path / "whole")


def test_an_imported_model_moves(corpus: Corpus, tmp_path: Path) -> None:
    """What from-hf writes under theirs starts the same run under either."""
    _train(OURS, tmp_path / "run", [*_arguments(corpus, []), "--training.steps", "4"], 1)
    with kept_environment():
        export_to_huggingface(tmp_path / "run", tmp_path / "public")
        import_from_huggingface(tmp_path / "public", tmp_path / "start")
    arguments = [*_arguments(corpus, []), "--model.init_from", str(tmp_path / "start")]
    _train(OURS, tmp_path / "whole", arguments, 1)
    _train(THEIRS, tmp_path / "other", arguments, 1)
    _assert_alike(tmp_path / "other", tmp_path / "whole")


def _arguments(corpus: Corpus, options: list[str]) -> list[str]:
    """Options of a run with an update inside every third step, so that hypergradients count."""
    return [
        *corpus.arguments(),
        *(
            "--policy.name",
            "dwm",
            "--weighting.encoder",
            "llm",
            "--weighting.update_on",
            "training",
        ),
        *("--weighting.warmup_steps", "2", "--training.steps", str(STEPS)),
        *("--training.learning_rate", "0.001", "--training.checkpoint_interval_steps", "4"),
        *options,
    ]


def _moved(folder: Path, arguments: list[str], ranks: int, theirs: Sequence[str] = ()) -> Path:
    """Train under ours, theirs and ours in turn; returns the run. theirs: options for theirs."""
    run_dir = folder / "moved"
    stop = {"name": "send_signal", "place": "training", "call": 4, "number": 15, "rank": 0}
    for python, options, fault, reached in (
        (OURS, (), stop, 4),
        (THEIRS, theirs, stop, 8),
        (OURS, (), None, STEPS),
    ):
        _train(python, run_dir, [*arguments, *RESUME, *options], ranks, fault)
        assert read_manifest(list_checkpoints(run_dir)[-1]).state.step == reached
    return run_dir


def _train(
    python: str, run_dir: Path, arguments: list[str], ranks: int, fault: dict | None = None
) -> None:
    """Train in fresh processes of an interpreter, with a fault of tests/small_runs."""
    launcher = [*TORCHRUN, "--nproc-per-node", str(ranks)]
    command = [python, *launcher, "-m", "tests.small_runs.forked", json.dumps(fault), *arguments]
    done = subprocess.run(
        [*command, "--run.dir", str(run_dir)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=REPOSITORY,
        env=_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # What torch's loader says of the release's call is not for users.
    assert "torch/distributed/checkpoint" not in done.stderr, done.stderr


def _environment() -> dict[str, str]:
    """Each interpreter finds its own release, so no path of this process is handed on."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1"}


def _assert_alike(run_dir: Path, expected: Path) -> None:
    for phase in ("train", "weighting"):
        ours, theirs = metrics(run_dir, phase), metrics(expected, phase)
        assert len(ours) == len(theirs) > 0
        for line, other in zip(ours, theirs, strict=True):
            assert line["step"] == other["step"]
            assert abs(line["loss"] - other["loss"]) < TOLERANCE, (phase, line["step"])
