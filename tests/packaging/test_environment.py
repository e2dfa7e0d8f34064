"""tools/environment.sh: installs once, for one command at a time, and says nothing when it is done.

A program that records how it is called stands in for the interpreter of .venv: installing needs an
index, and what is tested is when it is done.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
SCRIPT = 'set -euo pipefail; . tools/environment.sh "$0"; command -v python'
INTERPRETER = """#!/bin/bash
[ "$*" != "-m pip --version" ] || exit 0
echo "$@" >>calls
sleep 1
exit "$(cat status)"
"""
LIMIT_S = 60


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the script, what it reads, and an interpreter that records its calls."""
    for name in ("pyproject.toml", "tools/environment.sh", "tools/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(INTERPRETER)
    python.chmod(0o755)
    (tmp_path / "status").write_text("0")
    return tmp_path


def _start(clone: Path, extras: str, **environment: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["bash", "-c", SCRIPT, extras],
        cwd=clone,
        env={**os.environ, **environment},
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def _source(clone: Path, extras: str, **environment: str) -> tuple[int, str]:
    """Returns the exit status and what it printed to stderr."""
    process = _start(clone, extras, **environment)
    out, err = process.communicate(timeout=LIMIT_S)
    if process.returncode == 0:
        assert out.strip() == str(clone / ".venv" / "bin" / "python")
    return process.returncode, err


def _installed(clone: Path) -> list[str]:
    """Returns the extras of every call of pip."""
    calls = clone / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return [line.rpartition("[")[2].rstrip("]") if "[" in line else "" for line in lines]


def test_of_commands_started_at_once_one_installs(clone: Path) -> None:
    started = [_start(clone, "eval,report") for _ in range(3)]
    said = [process.communicate(timeout=LIMIT_S)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert _installed(clone) == ["eval,report"]
    assert sorted(map(len, map(str.splitlines, said))) == [0, 0, 1]


def test_it_installs_again_only_for_other_extras_or_other_releases(clone: Path) -> None:
    assert _source(clone, "report")[0] == 0
    assert _source(clone, "report") == (0, "")
    assert _source(clone, "study")[0] == 0
    with (clone / "tools" / "constraints.txt").open("a") as file:
        file.write("# another release\n")
    assert _source(clone, "study")[0] == 0
    assert _installed(clone) == ["report", "study", "study"]


def test_the_tests_environment_has_every_extra_but_gpu(clone: Path) -> None:
    project = pytest.importorskip("tomllib").loads((REPOSITORY / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    [own] = [line for line in extras["dev"] if line.startswith("megatron-dwm")]
    others = own.rpartition("[")[2].rstrip("]")
    assert set(others.split(",")) == extras.keys() - {"dev", "gpu"}

    assert _source(clone, "dev")[0] == 0
    assert _source(clone, others) == (0, "")
    assert _source(clone, "eval,gpu")[0] == 0
    assert _installed(clone) == ["dev", "eval,gpu"]


def test_what_failed_is_tried_again(clone: Path) -> None:
    (clone / "status").write_text("1")
    assert _source(clone, "study")[0] == 1
    (clone / "status").write_text("0")
    assert _source(clone, "study")[0] == 0
    assert _installed(clone) == ["study", "study"]


def test_no_extras_are_the_package_alone(clone: Path) -> None:
    assert _source(clone, "")[0] == 0
    assert (clone / "calls").read_text().splitlines()[0].endswith(f"--editable {clone}")


def test_an_environment_without_pip_is_made_again(clone: Path) -> None:
    """An interrupt in `venv`, or Debian without python3-venv, leaves an interpreter alone."""
    (clone / ".venv" / "bin" / "python").write_text("#!/bin/bash\nexit 1\n")
    maker = clone / "maker"
    maker.write_text(
        f'#!/bin/bash\n[ "$1" = -m ] || exec {sys.executable} "$@"\n'
        'echo "$@" >made\ncp whole "$3/bin/python"\n'
    )
    maker.chmod(0o755)
    (clone / "whole").write_text(INTERPRETER)
    assert _source(clone, "report", PYTHON=str(maker))[0] == 0
    assert (clone / "made").read_text() == f"-m venv {clone / '.venv'}\n"
    assert _installed(clone) == ["report"]


@pytest.mark.skipif(shutil.which("dash") is None, reason="needs dash, a shell that is not bash")
def test_another_shell_is_said(clone: Path) -> None:
    done = subprocess.run(
        ["dash", "-c", ". tools/environment.sh"], cwd=clone, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: tools/environment.sh is for bash")


def test_an_interpreter_that_cannot_be_used_is_said(clone: Path) -> None:
    (clone / ".venv" / "bin" / "python").unlink()
    status, said = _source(clone, "report", PYTHON="/no such/python")
    assert status == 2
    assert said.startswith("error: PYTHON=/no such/python: no Python 3.10 to 3.13")
