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
    """Returns the scores of each run that has any.

    Args:
        runs: the runs; files in their folder `evaluation` are read, too.
        given: `FILE.json`, whose name without the ending is a run's name, or `RUN=FILE.json`.

    Raises:
        UserError: a file is not one of tools/evaluate.py's, or belongs to no run.
    """
    found: Scores = {}
    for run in runs:
        for path in sorted((run.path / "evaluation").glob("*.json")):
            found.setdefault(run.name, []).extend(_read(path))
    for text in given:
        name, path = _named(text, [run.name for run in runs])
        found.setdefault(name, []).extend(_read(path))
    return found


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
        whole = all(set(score) >= _NEEDED for score in scores)
    except OSError as error:
        raise UserError(f"--scores {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"{path}: not a file that {name_of_command('evaluate')} --output wrote")
    return list(scores)
