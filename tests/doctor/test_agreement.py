"""The doctor on a run's own checkpoint: directions ahead against exact ones."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from megatron_dwm.files.digest import digest_of_files
from tests.forking.client import run_python
from tests.small_runs.command import succeed
from tests.small_runs.fixtures import Corpus

NAMES = [
    "ahead, all passages",
    "ahead, half of the passages",
    "ahead, a quarter of the passages",
    "exact, half of the passages",
    "exact, a quarter of the passages",
]


def compare(config: Path, *options: str, ranks: int | None = None) -> subprocess.CompletedProcess:
    command = ["-m", "megatron_dwm.doctor", str(config), "--run.resume", "true", *options]
    return run_python(command, environment={"PYTHONWARNINGS": "ignore"}, ranks=ranks)


def numbers(text: str) -> dict[str, float]:
    found = re.findall(r"alignments +(.*): correlation (\S+) with the exact ones", text)
    return {name: float(value) for name, value in found}


@pytest.fixture(scope="module")
def run_dir(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    method = ["--policy.name", "dwm", "--weighting.encoder", "llm"]
    succeed(folder, *corpus.arguments(), *method, "--training.micro_batch_size", "2")
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): digest_of_files([path]) for path in files}


def test_correlations_on_a_run_which_stays_as_it_is(run_dir: Path) -> None:
    before = digests(run_dir)
    done = compare(run_dir / "config.yaml")
    assert done.returncode == 0, done.stderr
    found = numbers(done.stdout)
    assert list(found) == NAMES and "step_00000020" in done.stdout
    # Two estimates of one direction: the same but for a step of the parameters and of the moments.
    assert found["ahead, all passages"] > 0.95
    assert found["exact, half of the passages"] > 0.5
    assert digests(run_dir) == before


def test_another_layout_finds_the_same(run_dir: Path) -> None:
    alone = numbers(compare(run_dir / "config.yaml").stdout)
    done = compare(run_dir / "config.yaml", "--parallel.pipeline", "2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert numbers(done.stdout) == pytest.approx(alone, abs=2e-3)


def test_what_cannot_be_compared_is_one_line(corpus: Corpus, run_dir: Path, tmp_path: Path) -> None:
    done = compare(run_dir / "config.yaml", "--run.dir", str(tmp_path / "none"))
    assert done.returncode == 2 and "no complete checkpoint" in done.stderr
    succeed(tmp_path / "plain", *corpus.arguments(), "--training.steps", "2")
    done = compare(tmp_path / "plain/config.yaml")
    assert done.returncode == 2 and "computes no hypergradients" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
