"""Scores from the harness's results, and their table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dwm.config import UserError
from megatron_dwm.evaluation.harness import read_scores
from megatron_dwm.evaluation.scores import (
    Score,
    comparable,
    format_table,
    read_written,
    write_scores,
)

RESULTS = {
    "results": {
        "quiz": {
            "name": "quiz",
            "alias": "quiz",
            "sample_len": 7,
            "acc,none": 0.5,
            "acc_stderr,none": 0.125,
            "f1,strict": 0.25,
            "f1_stderr,strict": "N/A",
        }
    },
    "n-shot": {"quiz": 2},
    "n-samples": {"quiz": {"original": 100, "effective": 7}},
    "higher_is_better": {"quiz": {"acc": True, "f1": True}},
}


def test_every_metric_is_a_score() -> None:
    accuracy, f1 = read_scores(RESULTS)
    assert accuracy == Score(
        task="quiz",
        num_fewshot=2,
        metric="acc",
        value=0.5,
        standard_error=0.125,
        higher_is_better=True,
        num_examples=7,
    )
    assert (f1.metric, f1.value, f1.standard_error) == ("f1", 0.25, None)


def test_a_name_forges_no_line_of_the_table() -> None:
    forged = replace(read_scores(RESULTS)[0], task="quiz\x1b[1A\nother", metric="a\rb")
    lines = format_table([forged], {"their\nscores": [forged]}).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[2].startswith(r"quiz\x1b[1A\nother  2      a\rb")


def test_table_lines_up() -> None:
    lines = format_table(read_scores(RESULTS)).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["quiz", "2", "acc", "higher", "0.5000", "0.1250", "7"]
    assert lines[3].split()[5] == "-"


def test_other_models_have_columns() -> None:
    ours = read_scores(RESULTS)
    theirs = [replace(ours[0], value=0.75, standard_error=0.25)]
    lines = format_table(ours, {"uniform": theirs}).splitlines()
    assert lines[0].split()[-4:] == ["uniform", "std.", "error", "difference"]
    assert lines[2].split()[-3:] == ["0.7500", "0.2500", "-0.2500"]
    assert lines[3].split()[-3:] == ["-", "-", "-"]
    assert len({len(line) for line in lines}) == 1


def test_only_the_same_questions_are_compared() -> None:
    ours = [replace(s, task_digest="a", questions_digest="b") for s in read_scores(RESULTS)]
    same = comparable(ours, [replace(s, value=0.75) for s in ours], "uniform")
    assert [score.value for score in same.scores] == [0.75, 0.75] and same.notes == []
    for change, what in (
        ({"questions_digest": "c"}, "has other questions"),
        ({"task_digest": "c"}, "is another task"),
    ):
        other = comparable(ours, [replace(s, **change) for s in ours], "uniform")
        assert other.scores == []
        [note] = other.notes
        assert note.startswith(f"uniform: quiz with 2 shots {what}")
    older = comparable(ours, read_scores(RESULTS), "uniform")
    assert len(older.scores) == 2
    [note] = older.notes
    assert "an older version wrote it" in note


def test_written_scores_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_scores(path, read_scores(RESULTS), {"limit": 7})
    assert read_written(path, limit=7) == read_scores(RESULTS)
    with pytest.raises(UserError, match="made with --limit 7, not None"):
        read_written(path, limit=None)


def test_scores_of_an_older_version_are_read(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_scores(path, read_scores(RESULTS), {"limit": None})
    content = json.loads(path.read_text())
    for score in content["scores"]:
        del score["task_digest"], score["questions_digest"]
    path.write_text(json.dumps(content))
    assert read_written(path, limit=None) == read_scores(RESULTS)


def test_written_scores_say_where_they_are_from(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.json", read_scores(RESULTS), {"model": "m"})
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["model"] == "m"
    assert [score["metric"] for score in written["scores"]] == ["acc", "f1"]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_filters_tell_scores_of_one_metric_apart() -> None:
    figures = {"exact_match,strict": 0.25, "exact_match,flexible": 0.5, "acc,none": 0.75}
    [task] = RESULTS["results"]
    better = {task: {"exact_match": True, "acc": True}}
    results = {**RESULTS, "results": {task: figures}, "higher_is_better": better}
    named = {score.metric: score.value for score in read_scores(results)}
    assert named == {
        "exact_match (strict)": 0.25,
        "exact_match (flexible)": 0.5,
        "acc": 0.75,
    }
