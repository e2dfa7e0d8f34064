"""Scores of an evaluation: one record for each metric, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dwm.config import UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.files.atomic import write_json


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task.

    standard_error: the harness's, in the metric's unit; None if it gives none.
    task_digest, questions_digest: see digests.py; None in records of older versions.
    """

    task: str
    num_fewshot: int
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool
    num_examples: int
    task_digest: str | None = None
    questions_digest: str | None = None


_TEXT_HEADINGS = ("task", "shots", "metric", "better")


def format_table(
    scores: Sequence[Score], others: Mapping[str, Sequence[Score]] | None = None
) -> str:
    """Returns the scores as a table of text, one line for each score, with headings.

    others: scores of other models by name; each gets its own columns, with the difference (ours
        minus theirs). Scores that only they have are left out.
    """
    rows = [[*_labels(score), *_figures(score), str(score.num_examples)] for score in scores]
    headings = [*_TEXT_HEADINGS, "value", "std. error", "examples"]
    for name, theirs in (others or {}).items():
        found = {_key(score): score for score in theirs}
        headings += [name, "std. error", "difference"]
        for row, score in zip(rows, scores, strict=True):
            row += _against(score, found.get(_key(score)))
    return _aligned([headings, *rows])


@dataclass(frozen=True, kw_only=True)
class Comparable:
    """Another model's scores on the same questions, and a note for each task that differs."""

    scores: list[Score]
    notes: list[str]


def comparable(scores: Sequence[Score], theirs: Sequence[Score], name: str) -> Comparable:
    """Returns those of `theirs`, called `name`, that can be compared with `scores`.

    Scores without digests are kept, with a note that they were not checked.
    """
    ours = {_key(score): score for score in scores}
    kept, notes = [], []
    for score in theirs:
        mine = ours.get(_key(score))
        difference = None if mine is None else _difference(mine, score)
        if difference is None:
            kept.append(score)
        else:
            shots = f"{score.task} with {score.num_fewshot} shots"
            notes.append(f"{name}: {shots} {difference}; its scores are left out")
    if any(score.questions_digest is None for score in kept):
        notes.append(
            f"{name}: has no digests of its questions (an older version wrote it); that they are "
            "the same is not checked"
        )
    return Comparable(scores=kept, notes=list(dict.fromkeys(notes)))


def _difference(ours: Score, theirs: Score) -> str | None:
    if theirs.task_digest not in (None, ours.task_digest):
        return "is another task (its file or its version differs)"
    if theirs.questions_digest not in (None, ours.questions_digest):
        return "has other questions (its data differ)"
    return None


def _labels(score: Score) -> list[str]:
    better = "higher" if score.higher_is_better else "lower"
    return [score.task, str(score.num_fewshot), score.metric, better]


def _figures(score: Score) -> list[str]:
    error = score.standard_error
    return [f"{score.value:.4f}", "-" if error is None else f"{error:.4f}"]


def _against(score: Score, other: Score | None) -> list[str]:
    if other is None:
        return ["-", "-", "-"]
    return [*_figures(other), f"{score.value - other.value:+.4f}"]


def _key(score: Score) -> tuple[str, int, str]:
    return score.task, score.num_fewshot, score.metric


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(_join(line, widths) for line in lines)


def _join(row: Sequence[str], widths: Sequence[int]) -> str:
    text = len(_TEXT_HEADINGS)
    words = [cell.ljust(width) for cell, width in zip(row[:text], widths[:text], strict=True)]
    figures = [cell.rjust(width) for cell, width in zip(row[text:], widths[text:], strict=True)]
    return "  ".join([*words, *figures])


def write_scores(path: Path, scores: Sequence[Score], about: dict[str, Any]) -> None:
    """Write {**about, "scores": [...]} as JSON; the file appears complete or not at all."""
    write_json(path, {**about, "scores": [asdict(score) for score in scores]}, indent=2)


def read_written(path: Path, *, limit: int | None) -> list[Score]:
    """Returns the scores in a file of `write_scores`, to compare with ours.

    Raises `UserError` if it is not such a file, or was made with another `--limit`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores = [Score(**score) for score in content["scores"]]
    except OSError as error:
        raise UserError(
            f"--compare {path}: {error.strerror}; name a file that --output wrote"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"--compare {path}: not a file that --output wrote; evaluate that model again"
        ) from None
    if content.get("limit") != limit:
        raise UserError(
            f"--compare {path}: made with --limit {content.get('limit')}, not {limit}; use the "
            "same --limit for both"
        )
    return scores
