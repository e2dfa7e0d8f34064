"""Files whose form is right and whose values are not: one line, or a note and the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_dwm.config.errors import UserError
from megatron_dwm.report.older_figures import LIST, remove_older
from megatron_dwm.report.run_files import read_metrics
from megatron_dwm.report.run_report import Request, contents_of, read_runs, write_report
from megatron_dwm.report.scores import read_scores
from megatron_dwm.report.sections.benchmarks import benchmarks
from megatron_dwm.report.weight_stream import weight_files

LINE = {"step": 1, "phase": "train", "loss": 3.0}
SCORE = {"task": "sciq", "num_fewshot": 0, "metric": "acc", "value": 0.5, "standard_error": 0.1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": "abc"},
        {"step": None},
        {"phase": ["train"]},
        {"domain_loss": [1.0]},
        {"seconds": "long"},
        {"loss": "high"},
    ],
    ids=str,
)
def test_a_line_with_a_value_of_another_kind_is_named(tmp_path: Path, wrong: dict) -> None:
    lines = [LINE, {**LINE, **wrong}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=f"metrics.jsonl line 2 has {next(iter(wrong))} "):
        read_metrics(tmp_path)


def test_a_row_without_a_step_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    table = pa.table({"step": [1, None], "sample_id": [0, 1], "weight": [1.0, 1.0]})
    pq.write_table(table, tmp_path / "weights" / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has a row without a step"):
        weight_files(tmp_path)


def test_wrong_settings_are_notes(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=100)
    config = {"training": {"steps": "forty"}, "data": {"train": 5}, "policy": {"name": "dwm"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    notes = [n for c in contents_of(read_runs(Request(run_dir=run))) for n in c.notes]
    steps = "training.steps 'forty', expected a whole number; it is left out"
    assert f"run: config.yaml has {steps}" in notes
    assert any("data.train 5, expected a list of prefixes" in note for note in notes)


def test_a_directory_in_the_place_of_the_page_is_named(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", steps=100)
    (run / "report" / "report.html").mkdir(parents=True)
    with pytest.raises(UserError, match=r"report\.html is a directory, expected a file"):
        write_report(Request(run_dir=run))


def test_figures_of_an_earlier_report_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "mine.png", "c.txt"):
        (tmp_path / name).write_text("x")
    remove_older(tmp_path, ["a.png", "b.png"])
    remove_older(tmp_path, ["a.png"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "c.txt", LIST, "mine.png"]
    (tmp_path / LIST).write_text("c.txt\nmine.png\n")
    remove_older(tmp_path, ["a.png"])
    assert (tmp_path / "mine.png").exists() and (tmp_path / "c.txt").exists()


@pytest.mark.parametrize("wrong", [{"value": None}, {"value": "high"}, {"standard_error": "N/A"}])
def test_a_score_that_is_no_number_is_named(
    make_run: Callable[..., Path], tmp_path: Path, wrong: dict
) -> None:
    run = make_run(tmp_path / "run", steps=100)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"scores": [{**SCORE, **wrong}]}))
    [name] = wrong
    with pytest.raises(UserError, match=rf"run\.json: score 1 \(sciq\) has {name} "):
        read_runs(Request(run_dir=run, scores=[str(path)]))


def test_a_file_of_scores_counts_once_and_nan_is_left_out(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", steps=100)
    path = run / "evaluation" / "run.json"
    path.parent.mkdir()
    lost = {**SCORE, "task": "arc", "value": float("nan")}
    path.write_text(json.dumps({"scores": [SCORE, lost]}))
    runs = read_runs(Request(run_dir=run, scores=[str(path), f"run={path}"]))
    assert len(read_scores(runs.runs, [str(path)])["run"]) == 2
    content = benchmarks(runs)
    assert [list(row) for row in content.tables[0].rows] == [
        ["sciq", "0", "acc", "0.5000 ± 0.1000"]
    ]
    assert "run: arc, acc is nan and left out." in content.notes
