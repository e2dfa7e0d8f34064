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


RECIPE = "examples/recipes/llama_7b_fp8.yaml"


@pytest.mark.parametrize("option", ["--mfu", "--node-gb-s", "--network-gb-s"])
def test_a_rate_of_nothing_is_refused(option: str) -> None:
    rest = ["--gpu", "h100-80gb", "--gpus", "512", option, "0"]
    done = run_python(["tools/scale.py", RECIPE, *rest], environment=QUIET)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{option}: expected" in done.stderr


def test_passes_over_pools_are_part_of_a_step() -> None:
    """Scoring a pool of two batches takes longer than training on one."""
    seconds = []
    for policy in ("uniform", "opus"):
        words = ["--model.preset", "llama-1.3b", "--training.micro_batch_size", "4"]
        words += ["--data.train", "unread", "--data.tokenizer", "unread", "--policy.name", policy]
        if policy == "opus":
            words += ["--validation.path", "unread", "--weighting.pool_batches", "2"]
        done = run_python(
            ["tools/scale.py", "--gpu", "h100-80gb", "--gpus", "8", *words], environment=QUIET
        )
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout.splitlines()[4].split("|")[6]))
    uniform, opus = seconds
    assert opus > 2 * uniform


def test_a_mistake_is_one_line() -> None:
    done = run_python(
        ["tools/scale.py", RECIPE, "--gpu", "h100-80gb", "--gpus", "2048"], environment=QUIET
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "training.global_batch_size 1024: expected a multiple of" in done.stderr
