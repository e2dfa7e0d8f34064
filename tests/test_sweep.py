"""examples/sweep.sh with real runs: every combination once, none twice, and a table of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path

import pytest

from tests.small_runs.fixtures import Corpus

REPOSITORY = Path(__file__).parent.parent
SCRIPT = str(REPOSITORY / "examples" / "sweep.sh")
LIMIT_S = 300
KEY = "weighting.learning_rate"
COMBINATIONS = [f"{KEY}={rate}.{seed}" for rate in ("1e-3", "3e-1") for seed in (1, 2)]


def _sweep(*words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JOBS": "2"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def _arguments(corpus: Corpus, out: Path) -> list[str]:
    """A sweep of four runs of six steps."""
    [_, file] = corpus.arguments()
    steps = ["--policy.name", "dwm", "--training.steps", "6", "--weighting.warmup_steps", "2"]
    return [file, str(out), *steps, *corpus.held_out(), "--seeds", "1,2", f"--{KEY}", "1e-3,3e-1"]


def _lines(run: Path) -> list[dict]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _final(run: Path) -> dict[str, float]:
    return [line["domain_loss"] for line in _lines(run) if line["phase"] == "evaluation"][-1]


def test_every_combination_once_and_a_table(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "a sweep"
    words = _arguments(corpus, out)
    done = _sweep(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == COMBINATIONS
    table = done.stdout[done.stdout.index("| held-out loss") :]
    _require_mean_and_error(table, out)

    # One run is interrupted: the same command goes on with it, and repeats no other.
    again = out / COMBINATIONS[1]
    before = {name: (out / name / "metrics.jsonl").read_bytes() for name in COMBINATIONS}
    (again / "checkpoints" / "step_00000006" / "manifest.json").unlink()
    done = _sweep(*words)
    assert done.returncode == 1, "no checkpoint is left, which a run does not hide"
    assert done.stdout.count("finished before") == 3
    assert before == {name: (out / name / "metrics.jsonl").read_bytes() for name in COMBINATIONS}

    done = _sweep(*words, "--weighting.interval_steps", "2")
    assert done.returncode == 2 and "another configuration or other keys" in done.stderr


def _require_mean_and_error(table: str, out: Path) -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    heading, _, *settings = rows
    assert [row[:2] for row in settings] == [[f"{KEY}=1e-3", "2"], [f"{KEY}=3e-1", "2"]]
    for setting, _, *cells in settings:
        losses = [_final(out / f"{setting}.{seed}") for seed in (1, 2)]
        for domain, cell in zip(heading[2:], cells, strict=True):
            one, other = (each[domain] for each in losses)
            # Of two values the standard error is half their distance.
            expected = f"{statistics.mean([one, other]):.3f} ± {abs(one - other) / 2:.3f}"
            assert cell == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("examples/tiny.yaml",), "expected CONFIG.yaml and OUT_DIR first"),
        (("none.yaml", "out"), "none.yaml: no such configuration file"),
        (("examples/tiny.yaml", "out", "--seeds", "a"), "--seeds: expected numbers with commas"),
        (("examples/tiny.yaml", "out", "--seeds", "1,2,1"), "--seeds: 1 is there twice"),
        (("examples/tiny.yaml", "out", f"--{KEY}", "1,1"), f"--{KEY}: 1 is there twice"),
        (("examples/tiny.yaml", "out", "--data.tokenizer", "none.model"), "none.model"),
        (("examples/tiny.yaml", "out", "--seed", "3"), "--seed: no option of the sweep"),
        (("examples/tiny.yaml", "out", "--run.seed", "3"), "--run.seed: set by the sweep"),
        (
            ("examples/tiny.yaml", "out", "--policy.name", "a/b,c"),
            "they cannot have a blank or one of /",
        ),
        (("examples/tiny.yaml", "out", "--policy.name", "a,,c"), "a value between commas is empty"),
        (("examples/tiny.yaml", "out", "--training.step", "1,2"), "unknown key 'training.step'"),
        (("examples/tiny.yaml", "out", f"--{KEY}", "1,x"), "Expected a float. Got value: x"),
        (("examples/tiny.yaml", "out", "--evaluation.path", "null"), "evaluation.path: not set"),
        (
            ("examples/tiny.yaml", "out", "--policy.name", "uniform", f"--{KEY}", "1e-3,1e-2"),
            "weighting.learning_rate: has no effect: policy uniform",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    out = str(tmp_path / "out")
    done = _sweep(*(out if word == "out" else word for word in words))
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not Path(out).exists()
