"""tools/first_gpu_run.sh on a machine without a GPU: every part runs, or is left out by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.forking.client import REPOSITORY, run_python

SCRIPT = ["bash", str(REPOSITORY / "tools" / "first_gpu_run.sh")]
LIMIT_S = 500
SECTIONS = ["Models", "Hardware", "Results", "Configuration of dwm_bf16", "Versions and date"]
ON_A_GPU = ["gpu_tests", "step_fp8", "hypergradient_fp8", "dwm_fp8"]
ANYWHERE = ["doctor", "step_bf16", "hypergradient_bf16", "data", "dwm_bf16", "alignments"]


def run(
    workdir: Path, limit_s: int = LIMIT_S, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SCRIPT, str(workdir)],
        env={**os.environ, "SIZES": "tiny", **environment},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU parts would run, too")
def test_the_report_of_a_cpu(tmp_path: Path) -> None:
    workdir = tmp_path / "a work dir"  # spaces happen
    python = tmp_path / "an environment" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = run(workdir, PERFORMED_BY="a test", PYTHON=str(python))
    assert done.returncode == 0, done.stdout + done.stderr
    report = (workdir / "report.md").read_text()
    headings = [line[3:] for line in report.splitlines() if line.startswith("## ")]
    assert headings == [*SECTIONS, "Findings"]
    assert "Performed by: a test" in report
    for name in ON_A_GPU:
        assert f"| {name} | left out: " in report
    for name in ANYWHERE:
        assert f"| {name} | done | " in report
    for words in (
        "tangent probe agrees with unroll",
        "| ours, uniform weights |",
        "| hypergradient (tangent probe) |",
        "| steps, weighting updates | 60, 1 |",
        "bf16 against emulated FP8",
        f"| torch | {torch.__version__.split('+')[0]}",
        "precision: bf16",
    ):
        assert words in report, words
    assert "WORKDIR/data" in report


def test_a_part_that_fails_is_reported_with_its_last_errors(tmp_path: Path) -> None:
    rows = ["doctor\t1\t3\tpython -m x", "step_bf16\t124\t300\tpython y"]
    rows.append("dwm_fp8\tleft out\t0\tno FP8")
    (tmp_path / "parts.tsv").write_text("\n".join(rows) + "\n")
    for name in ("doctor", "step_bf16"):
        (tmp_path / f"{name}.out").write_text(f"{name} began\n")
        (tmp_path / f"{name}.err").write_text("".join(f"line {n}\n" for n in range(40)))
    done = run_python(["tools/first_run.py", "report", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "| doctor | failed: exit code 1 | 3 | `python -m x` |" in report
    assert "| step_bf16 | failed: over its time limit | 300 |" in report
    assert "doctor began\nline 25\n" in report and "line 24\n" not in report


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SIZES": "huge"}, "SIZES=huge: expected full, laptop or tiny"),
        ({"PYTHON": "/bin/false"}, "/bin/false has no megatron_dwm; install it"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, environment: dict[str, str], said: str) -> None:
    done = run(tmp_path / "new", limit_s=60, **environment)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "new").exists()


def test_a_used_workdir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run(tmp_path, limit_s=60)
    assert done.returncode == 2 and "is not empty" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes"], "unknown option --sizes; see --help"),
        (["a", "b"], "expected one WORKDIR, got 2 words; see --help"),
    ],
)
def test_words_without_a_meaning_are_refused(tmp_path: Path, words: list[str], said: str) -> None:
    done = subprocess.run([*SCRIPT, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
