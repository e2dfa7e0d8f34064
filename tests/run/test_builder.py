"""`model.builder hybrid` under a release of Megatron-Core that has no HybridModel."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.runtime import releases
from tests.convert.families import write_llama
from tests.forking.client import run_python
from tests.small_runs.command import pretrain
from tests.small_runs.fixtures import Corpus

REFUSED = (
    "error: model.builder hybrid: Megatron-Core {} has no HybridModel; install 0.18 or newer, "
    "which needs Python 3.12, or use model.builder gpt, which reads the same checkpoints\n"
)


@pytest.fixture(autouse=True)
def without_hybrid_model() -> None:
    """Skip where the key has an effect; tests/compat shows which."""
    if releases.has_hybrid_model():
        pytest.skip("this release has HybridModel")


def test_a_run_is_refused_in_one_line(corpus: Corpus, tmp_path: Path) -> None:
    for processes in (1, 2):
        arguments = [*corpus.arguments(), "--model.builder", "hybrid"]
        done = pretrain(tmp_path / "run", *arguments, processes=processes)
        assert done.returncode == 2
        assert done.stderr.splitlines(keepends=True)[-1] == REFUSED.format(releases.version())
        assert done.stderr.count("HybridModel") == 1  # not once for each process
        assert not (tmp_path / "run").exists()


def test_the_doctor_refuses_it_before_it_reports() -> None:
    done = run_python(["-m", "megatron_dwm.doctor", "--model.builder", "hybrid"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(REFUSED.format(releases.version()))


def test_an_import_is_refused(tmp_path: Path) -> None:
    public = write_llama(tmp_path / "public")
    command = ["tools/convert_checkpoint.py", "from-hf", str(public), "--builder", "hybrid"]
    done = run_python([*command, "--output", str(tmp_path / "ours")])
    assert done.returncode == 2
    assert done.stderr.endswith(REFUSED.format(releases.version()))
