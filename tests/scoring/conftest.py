"""A small model and its export, which score documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints
from tests.forking.client import run_python
from tests.selection.conftest import run  # noqa: F401
from tests.small_runs.command import succeed
from tests.small_runs.fixtures import Corpus


@pytest.fixture(scope="package")
def checkpoint(short: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after some steps on the short documents, with a context of 64 tokens.

    Its vocabulary of 600 is no multiple of the padding, so padded rows would show.
    """
    run_dir = tmp_path_factory.mktemp("model") / "run"
    sizes = ["--model.vocab_size", "600", "--data.sequence_length", "64", "--training.steps", "6"]
    succeed(run_dir, *short.arguments(), *sizes, "--policy.name", "uniform")
    return list_checkpoints(run_dir)[-1]


@pytest.fixture(scope="package")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face directory."""
    output = tmp_path_factory.mktemp("export") / "hf"
    command = ["tools/convert_checkpoint.py", "to-hf", checkpoint]
    run_python(list(map(str, [*command, "--output", output]))).check_returncode()
    return output
