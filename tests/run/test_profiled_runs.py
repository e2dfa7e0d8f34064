"""A run that is profiled: ranges named after the loop's phases, and the same training."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.small_runs.command import pretrain, succeed, without_time
from tests.small_runs.fixtures import Corpus

DWM = ("--policy.name", "dwm")
# Updates before steps 6 and 9 (from 1): warm-up 5, then every 3 (tests/small_runs/fixtures.py).
WINDOW = "--profiling.tool torch --profiling.first_step 6 --profiling.last_step 9".split()


def ranges(file: Path) -> Counter[str]:
    with gzip.open(file, "rt", encoding="utf-8") as text:
        events = json.load(text)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_phases_of_the_loop_are_in_the_trace(corpus: Corpus, tmp_path: Path) -> None:
    arguments = [*corpus.arguments(), "--training.steps", "10", "--policy.name", "dwm"]
    arguments += ["--training.checkpoint_interval_steps", "7"]
    succeed(tmp_path / "plain", *arguments)
    succeed(tmp_path / "profiled", *arguments, *WINDOW)
    (file,) = (tmp_path / "profiled" / "profile").iterdir()
    found = ranges(file)
    expected = {
        "step": 4,
        "optimizer step": 4,
        "weighting update": 2,
        "hypergradient": 2,
        "weighting model": 2,
        "weighted gradient": 6,
        "checkpoint": 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert without_time(tmp_path / "profiled") == without_time(tmp_path / "plain")


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("--profiling.last_step 2", "profiling.first_step, profiling.last_step: expected 1 or"),
        ("--profiling.first_step 21 --profiling.last_step 22", "expected at most training.steps"),
        ("--profiling.ranks [1]", "profiling.ranks [1]: expected a list of ranks from 0 to 0"),
        ("--profiling.tool perf", "profiling.tool: expected one of"),
    ],
)
def test_mistakes_are_one_line(corpus: Corpus, tmp_path: Path, mistake: str, said: str) -> None:
    done = pretrain(tmp_path / "run", *corpus.arguments(), *DWM, *WINDOW, *mistake.split())
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()
