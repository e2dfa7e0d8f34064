"""The tables of docs/scale.md are what their commands print."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.forking.client import REPOSITORY, run_python

DOCUMENT = (REPOSITORY / "docs" / "scale.md").read_text()
COMMANDS = re.findall(r"^python (tools/scale\.py .*)$", DOCUMENT, re.MULTILINE)
QUIET = {"PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_document_has_what_its_command_prints(command: str) -> None:
    done = run_python(shlex.split(command), environment=QUIET)
    assert done.returncode == 0, done.stderr
    assert f"python {command}\n```\n\n{done.stdout.strip()}\n" in DOCUMENT


def test_a_mistake_is_one_line() -> None:
    recipe = "examples/recipes/llama_7b_fp8.yaml"
    done = run_python(
        ["tools/scale.py", recipe, "--gpu", "h100-80gb", "--gpus", "2048"], environment=QUIET
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "training.global_batch_size 1024: expected a multiple of" in done.stderr
