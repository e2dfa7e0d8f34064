"""Benchmark scores with standard errors, by group of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.report.charts import bars
from megatron_dwm.report.content import Cell, Column, Content, Figure, Table, columnar
from megatron_dwm.report.runs import RunSet

_ACCURACIES = ("acc", "acc_norm", "exact_match")
Key = tuple[str, int, str]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Mean score of a group's runs. error: standard error, None if unknown; runs: how many."""

    value: float
    error: float | None
    runs: int


def benchmarks(runs: RunSet) -> Content:
    """Returns the section with the scores of tools/evaluate.py."""
    if not runs.scores:
        note = (
            f"No benchmark scores: export the model, run {name_of_command('evaluate')} --output "
            "RUN/evaluation/NAME.json, or name its file with --scores."
        )
        return Content(id="benchmarks", title="Benchmarks", notes=[note])
    results = _results(runs)
    return Content(
        id="benchmarks",
        title="Benchmarks",
        lead="Scores of lm-evaluation-harness. Errors are standard errors: over the runs of a "
        "group where several were evaluated, else the harness's over the examples.",
        figures=_figure(runs, results),
        tables=[_table(runs, results)],
        notes=[*_differing(runs), *_not_finite(runs), *_evaluated_again(runs)],
    )


def _results(runs: RunSet) -> dict[Key, dict[str, Result]]:
    """Returns the result of each group by task, shots and metric."""
    found: dict[Key, dict[str, list[Mapping[str, Any]]]] = {}
    for group in runs.groups:
        for run in group.runs:
            for score in filter(_is_finite, runs.scores.get(run.name, ())):
                by_group = found.setdefault(_key(score), {})
                by_group.setdefault(group.name, []).append(score)
    return {
        key: {name: _result(scores) for name, scores in by_group.items()}
        for key, by_group in found.items()
    }


def _is_finite(score: Mapping[str, Any]) -> bool:
    return math.isfinite(score["value"])


def _not_finite(runs: RunSet) -> list[str]:
    return [
        f"{name}: {score['task']}, {score['metric']} is {score['value']} and left out."
        for name, scores in runs.scores.items()
        for score in scores
        if not _is_finite(score)
    ]


def _evaluated_again(runs: RunSet) -> list[str]:
    """Notes the files that count where a run has several with the same score."""
    files = {
        (name, score["file"], tuple(score["older_files"])): None
        for name, scores in runs.scores.items()
        for score in scores
        if score["older_files"]
    }
    return [
        f"{name} was evaluated again: {file}, the newest, counts, not {', '.join(older)}."
        for name, file, older in files
    ]


def _key(score: Mapping[str, Any]) -> Key:
    return str(score["task"]), int(score["num_fewshot"]), str(score["metric"])


def _result(scores: Sequence[Mapping[str, Any]]) -> Result:
    values = [float(score["value"]) for score in scores]
    error = scores[0].get("standard_error")
    error = error if error is not None and math.isfinite(error) else None
    if len(values) > 1:
        error = stdev(values) / math.sqrt(len(values))
    return Result(value=mean(values), error=error, runs=len(values))


def _table(runs: RunSet, results: Mapping[Key, Mapping[str, Result]]) -> Table:
    columns = [Column(name=name, title=name) for name in ("task", "shots", "metric")]
    groups = [g.name for g in runs.groups if any(g.name in by for by in results.values())]
    columns += [Column(name=f"group_{i}", title=name) for i, name in enumerate(groups)]
    rows: list[list[Cell]] = [
        [task, str(shots), metric, *(_text(by.get(name)) for name in groups)]
        for (task, shots, metric), by in results.items()
    ]
    return Table(title="Scores", columns=columns, rows=rows)


def _text(result: Result | None) -> str | None:
    if result is None:
        return None
    error = "" if result.error is None else f" ± {result.error:.4f}"
    return f"{result.value:.4f}{error}"


def _figure(runs: RunSet, results: Mapping[Key, Mapping[str, Result]]) -> list[Figure]:
    rows: list[list[Cell]] = []
    for (task, shots, metric), by_group in results.items():
        for name, result in by_group.items():
            if metric.partition(" (")[0] in _ACCURACIES:  # with the name of a filter
                value, error = result.value, result.error
                ends = [None, None] if error is None else [value - error, value + error]
                rows.append([f"{task}, {shots} shots, {metric}", name, value, *ends])
    if not rows:
        return []
    side = Column(name="task", title="task")
    y = Column(name="score", title="accuracy", unit="fraction of the examples")
    columns = (
        side,
        Column(name="run", title="run"),
        y,
        Column(name="low", title="score less its standard error"),
        Column(name="high", title="score plus its standard error"),
    )
    names = [group.name for group in runs.groups]
    chart = bars(y, side, color="run", names=names)
    return [
        Figure(
            id="benchmarks",
            title="Accuracy by task",
            caption="Points are scores, lines reach one standard error to either side.",
            columns=columns,
            data=columnar(columns, rows),
            chart={**chart, "height": max(120, 26 * len(rows))},
            series="run",
            names=names,
        )
    ]


def _differing(runs: RunSet) -> list[str]:
    """Notes the tasks whose questions are not the same for all runs."""
    digests: dict[tuple[str, int], set[Any]] = {}
    for scores in runs.scores.values():
        for score in scores:
            key = (str(score["task"]), int(score["num_fewshot"]))
            digest = (score.get("task_digest"), score.get("questions_digest"))
            digests.setdefault(key, set()).add(digest)
    return [
        f"{task} with {shots} shots: the runs had different questions or another version of the "
        "task, so their scores cannot be compared."
        for (task, shots), found in digests.items()
        if len(found) > 1
    ]
