"""Benchmark scores that tools/evaluate.py wrote, by run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.report.runs import Run

_NEEDED = {"task", "num_fewshot", "metric", "value"}
Scores = dict[str, list[Mapping[str, Any]]]


def read_scores(runs: Sequence[Run], given: Sequence[str]) -> Scores:
    """Returns the scores of each run that has any; of several files with one, the newest counts.

    A score that an older file has, too, says so under `older_files`.

    Args:
        runs: the runs; files in their folder `evaluation` are read, too.
        given: `FILE.json`, whose name without the ending is a run's name, or `RUN=FILE.json`.

    Raises:
        UserError: a file is not one of tools/evaluate.py's, or belongs to no run.
    """
    paths: dict[str, dict[Path, Path]] = {}
    for run in runs:
        for path in sorted((run.path / "evaluation").glob("*.json")):
            paths.setdefault(run.name, {})[path.resolve()] = path
    for text in given:
        name, path = _named(text, [run.name for run in runs])
        paths.setdefault(name, {}).setdefault(path.resolve(), path)
    return {name: _newest(list(files.values())) for name, files in paths.items()}


def _newest(files: Sequence[Path]) -> list[Mapping[str, Any]]:
    """Returns each score once: a run that was evaluated again is no second run."""
    read = {path: _read(path) for path in files}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        for score in read[path]:
            key = (score["task"], score["num_fewshot"], score["metric"])
            older = [*found[key]["older_files"], found[key]["file"]] if key in found else []
            found[key] = {**score, "file": str(path), "older_files": older}
    return list(found.values())


def _named(text: str, names: Sequence[str]) -> tuple[str, Path]:
    before, equals, after = text.partition("=")
    if equals and before in names:
        return before, Path(after)
    path = Path(text)
    for name in names:
        if path.stem in (name, Path(name).name):
            return name, path
    raise UserError(
        f"--scores {text}: no run is called {path.stem}; write RUN={text} with a RUN of "
        + ", ".join(names)
    )


def _read(path: Path) -> list[Mapping[str, Any]]:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
        whole = all(isinstance(score, dict) and set(score) >= _NEEDED for score in scores)
    except OSError as error:
        raise UserError(f"--scores {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"{path}: not a file that {name_of_command('evaluate')} --output wrote")
    for number, score in enumerate(scores, start=1):
        _check(score, f"{path}: score {number} ({score['task']})")
    return list(scores)


def _check(score: Mapping[str, Any], where: str) -> None:
    """Check that numbers are numbers, NaN among them; raises UserError."""
    kinds = {"num_fewshot": int, "value": int | float, "standard_error": int | float | None}
    for name, kind in kinds.items():
        value = score.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{where} has {name} {value!r}, expected a number")
