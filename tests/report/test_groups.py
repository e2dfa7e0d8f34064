"""Runs that differ only in the seed, and what a run needs to reach the baseline's loss."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.report.curves import group_rows, key
from megatron_dwm.report.groups import grouped, repeated
from megatron_dwm.report.reach import MEAN, work_to_reach
from megatron_dwm.report.run_report import Request, contents_of, read_runs
from megatron_dwm.report.runs import Run, RunSet
from megatron_dwm.report.sections.benchmarks import benchmarks
from megatron_dwm.report.speed import SPEED, with_speed
from tests.report.test_report import rows_where


def config(policy: str, seed: int, **keys: object) -> dict:
    return {"run": {"seed": seed, "dir": f"{policy}{seed}"}, "policy": {"name": policy}, **keys}


def bare(name: str, settings: dict) -> Run:
    return Run(name=name, path=Path(name), metrics=[], config=settings)


def test_only_the_seed_and_the_directory_may_differ() -> None:
    runs = [
        bare("a", config("dwm", 1, typed_paths={"directory": "/x"})),
        bare("b", config("dwm", 2, typed_paths={"directory": "/y"})),
        bare("c", config("dwm", 1, training={"steps": 5})),
        bare("d", {}),
        bare("e", {}),
    ]
    assert [group.name for group in grouped(runs)] == ["a (2 seeds)", "c", "d", "e"]


def test_a_seed_counts_once_and_what_does_not_change_training_does_not_count() -> None:
    def with_keys(seed: int, tensor: int, keep: int) -> dict:
        return config("dwm", seed, parallel={"tensor": tensor}, training={"keep_last": keep})

    runs = [
        bare("a", with_keys(1, 1, 0)),
        bare("b", with_keys(1, 2, 0)),
        bare("c", with_keys(2, 2, 5)),
    ]
    assert [group.name for group in grouped(runs)] == ["a (2 seeds)", "b"]
    assert repeated(runs) == [(runs[1], runs[0])]


@pytest.fixture
def four(make_run: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Two runs that learn the target faster than two uniform ones."""
    runs = []
    for policy, gain in (("dwm", 0.4), ("uniform", 0.1)):
        for seed in (1, 2):
            name = f"{policy}{seed}"
            settings = config(policy, seed)
            gained = gain + 0.02 * seed
            runs.append(make_run(tmp_path / name, gain=gained, seed=seed, config=settings))
    return runs


def test_lines_are_means_and_bands_the_lowest_and_highest(four: list[Path]) -> None:
    runs = read_runs(Request(run_dir=four[0], compare=four[1:]))
    [losses] = [content for content in contents_of(runs) if content.id == "losses"]
    figure = losses.figures[0]
    drawn = rows_where(figure, text="held out: target", run="dwm1 (2 seeds)")
    by_run = [
        [x["domain_loss"]["target"] for x in run.lines("evaluation")] for run in runs.runs[:2]
    ]
    assert [row["loss"] for row in drawn] == pytest.approx(np.mean(by_run, axis=0), rel=1e-6)
    assert [row["low"] for row in drawn] == pytest.approx(np.min(by_run, axis=0), rel=1e-6)
    assert [row["high"] for row in drawn] == pytest.approx(np.max(by_run, axis=0), rel=1e-6)


def test_few_points_stay_where_they_were_measured() -> None:
    steps = [20, 30, 40, 60]
    lines = [{"phase": "evaluation", "step": s, "stage": 1, "loss": s / 7} for s in steps]
    run = Run(name="a", path=Path("a"), metrics=lines, config={})
    runs = RunSet(runs=[run], groups=grouped([run]))
    rows = group_rows(runs, runs.groups[0], "evaluation", key("loss"))
    assert [(row[0], row[4]) for row in rows] == [(s, s / 7) for s in steps]


def test_a_run_that_is_behind_ends_its_group(four: list[Path]) -> None:
    path = four[1] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(x for x in lines if json.loads(x)["step"] <= 600))
    runs = read_runs(Request(run_dir=four[0], compare=four[1:]))
    [losses] = [content for content in contents_of(runs) if content.id == "losses"]
    drawn = rows_where(losses.figures[0], text="held out: target", run="dwm1 (2 seeds)")
    assert [row["step"] for row in drawn] == [100, 200, 300, 400, 500, 600]


def test_work_is_interpolated_between_evaluations() -> None:
    curve = np.array([[10.0, 5.0], [20.0, 4.0], [30.0, 2.0], [40.0, 3.0]])
    assert work_to_reach(curve, 3.0) == 25.0
    assert work_to_reach(curve, 2.0) == 30.0
    assert work_to_reach(curve, 6.0) == 10.0
    assert work_to_reach(curve, 1.9) is None


def test_work_to_the_baselines_loss_is_that_of_the_closed_form(four: list[Path]) -> None:
    """The files' losses are base(step) - gain * step / 1000; linear between the evaluations."""
    runs = read_runs(Request(run_dir=four[0], compare=four[1:]))
    assert runs.baseline.name == "uniform1 (2 seeds)" and runs.target == "target"
    [comparison] = [content for content in contents_of(runs) if content.id == "comparison"]
    figure = comparison.figures[0]

    def loss(step: int, gain: float) -> float:
        return 3.4 + 4.0 * math.exp(-step / 150) - gain * step / 1000

    wanted = (loss(1000, 0.12) + loss(1000, 0.14)) / 2
    shares = []
    for gain in (0.42, 0.44):
        after = next(step for step in range(100, 1001, 100) if loss(step, gain) <= wanted)
        above, below = loss(after - 100, gain), loss(after, gain)
        shares.append((after - 100 + 100 * (above - wanted) / (above - below)) / 1000)
    [row] = rows_where(figure, domain="target")
    assert row["share"] == pytest.approx(sum(shares) / 2, rel=1e-6)
    assert [row["low"], row["high"]] == pytest.approx(sorted(shares), rel=1e-6)
    assert len(rows_where(figure, domain=MEAN)) == 1


def test_losses_are_compared_at_a_step_that_both_have(four: list[Path]) -> None:
    """The baseline ends at step 600, of which its loss less the other's is 0.3 * 0.6."""
    path = four[2] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(x for x in lines if json.loads(x)["step"] <= 600))
    runs = read_runs(Request(run_dir=four[0], compare=four[1:]))
    [content] = [content for content in contents_of(runs) if content.id == "comparison"]
    work, losses = content.tables
    row = next(row for row in losses.rows if row[0] == "target")
    assert "at step 1,000 (-0.180 at step 600)" in row[1] and row[2].endswith("at step 600")
    assert "Runs end at different steps" in losses.caption
    assert {row[2] for row in work.rows} == {600}


def test_work_to_a_loss_of_the_first_evaluation_is_a_bound(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    fast = make_run(tmp_path / "fast", gain=60.0, config=config("dwm", 1))
    base = make_run(tmp_path / "base", config=config("uniform", 1))
    runs = read_runs(Request(run_dir=fast, compare=[base]))
    [content] = [content for content in contents_of(runs) if content.id == "comparison"]
    row = next(row for row in content.tables[0].rows if row[0] == "target")
    assert row[3] == "≤ 0.10 ×"


def test_errors_over_runs_are_standard_errors_of_the_mean(four: list[Path]) -> None:
    def score(value: float) -> dict:
        return {
            "task": "sciq",
            "num_fewshot": 0,
            "metric": "acc",
            "value": value,
            "standard_error": 0.1,
            "questions_digest": "q" if value < 0.8 else "other",
        }

    for path, value in zip(four[:3], (0.5, 0.6, 0.8), strict=True):
        (path / "evaluation").mkdir()
        text = json.dumps({"scores": [score(value)]})
        (path / "evaluation" / "sciq.json").write_text(text)
    runs = read_runs(Request(run_dir=four[0], compare=four[1:]))
    content = benchmarks(runs)
    assert [list(row) for row in content.tables[0].rows] == [
        # |0.6 - 0.5| / 2 is the standard error of the mean of two.
        ["sciq", "0", "acc", "0.5500 ± 0.0500", "0.8000 ± 0.1000"]
    ]
    assert [note for note in content.notes if "cannot be compared" in note]


def test_a_run_that_was_evaluated_again_counts_once(four: list[Path]) -> None:
    """The newest file counts, whatever its name, and a note names both."""
    folder = four[0] / "evaluation"
    folder.mkdir()
    for number, (name, value) in enumerate((("b", 0.3), ("a", 0.5))):
        score = {"task": "t", "num_fewshot": 0, "metric": "acc", "value": value}
        (folder / f"{name}.json").write_text(json.dumps({"scores": [score]}))
        os.utime(folder / f"{name}.json", (number, number))
    content = benchmarks(read_runs(Request(run_dir=four[0])))
    assert [list(row) for row in content.tables[0].rows] == [["t", "0", "acc", "0.5000"]]
    [note] = content.notes
    assert "a.json, the newest, counts, not " in note and note.endswith("b.json.")
    [figure] = content.figures
    assert (figure.data["low"], figure.data["high"]) == ([None], [None])


def test_losses_are_compared_over_the_seeds_that_both_have(
    four: list[Path], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """A third seed that is far worse moves the group's own loss, and no difference."""
    both = read_runs(Request(run_dir=four[0], compare=four[1:]))
    third = make_run(tmp_path / "third", gain=-3.0, config=config("dwm", 3))
    more = read_runs(Request(run_dir=four[0], compare=[*four[1:], third]))
    cells, notes = [], []
    for runs in (both, more):
        [content] = [found for found in contents_of(runs) if found.id == "comparison"]
        *_, losses = content.tables
        text = next(str(row[1]) for row in losses.rows if row[0] == "target")
        cells.append(text.partition(" ("))
        notes.append(content.notes)
    assert cells[0][2] == cells[1][2] and cells[0][0] != cells[1][0]
    assert (
        notes[0] == []
        and "differences of losses are over 1, 2, work to reach a loss is over all." in notes[1][0]
    )


def test_a_seed_without_an_evaluation_yet_is_left_out_on_both_sides(
    four: list[Path], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """As `--watch` meets it: dwm's third seed has begun, and uniform's, which is worse, has not."""
    begun = make_run(tmp_path / "begun", config=config("dwm", 3))
    lines = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_text("".join(x for x in lines if '"evaluation"' not in x))
    worse = make_run(tmp_path / "worse", gain=-3.0, config=config("uniform", 3))
    found = []
    for more in ([], [begun, worse]):
        runs = read_runs(Request(run_dir=four[0], compare=[*four[1:], *more]))
        [content] = [found for found in contents_of(runs) if found.id == "comparison"]
        *_, losses = content.tables
        text = next(str(row[1]) for row in losses.rows if row[0] == "target")
        [figure] = [each for each in content.figures if each.id == "loss_difference"]
        found.append((text.partition(" (")[2], figure.data["difference"]))
    assert found[0] == found[1]


def test_a_run_that_is_shorter_loses_no_point_of_the_difference(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """More evaluations than bins: both runs are binned by the steps that both have."""
    paths = [
        make_run(tmp_path / f"{name}", steps=steps, gain=gain, config=config(name, 1))
        for name, steps, gain in (("dwm", 24_900, 0.4), ("uniform", 25_000, 0.1))
    ]
    runs = read_runs(Request(run_dir=paths[0], compare=paths[1:]))
    [content] = [found for found in contents_of(runs) if found.id == "comparison"]
    [figure] = [each for each in content.figures if each.id == "loss_difference"]
    steps = [
        s for s, d in zip(figure.data["step"], figure.data["domain"], strict=True) if d == MEAN
    ]
    assert len(steps) == 200 and max(steps) >= 24_800


def test_speed_is_that_of_the_step_alone() -> None:
    """An evaluation of 30 s and an update of 5 s between two steps do not count."""
    times = [("train", 1, 10, 1.0), ("evaluation", 1, 10, 31.0), ("weighting", 1, 10, 36.0)]
    times += [("train", 2, 20, 38.0), ("train", 3, 20, 39.0), ("train", 4, 40, 39.0)]
    lines = [
        {"phase": phase, "step": step, "tokens": tokens, "seconds": seconds}
        for phase, step, tokens, seconds in times
    ]
    assert [line.get(SPEED) for line in with_speed(lines)] == [None, None, None, 5.0, None, None]
    del lines[2]["seconds"]
    assert with_speed(lines)[3] == lines[3]
