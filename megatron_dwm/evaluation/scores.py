"""What an evaluation found: one record a figure, as a table and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dwm.config import UserError
from megatron_dwm.config.printing import printable


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task.

    standard_error: the harness's, in the metric's unit; None where it gives none.
    task_digest, questions_digest: of what was asked (digests.py); None in older records.
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
    """The scores as lines of text, one a score, under headings.

    others: scores of other models by name; each gets columns of its own beside ours, with the
        difference (ours minus theirs). Figures of theirs that ours have not are left out.
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
    """Another model's scores that answer our questions, and a line for each task that does not."""

    scores: list[Score]
    notes: list[str]


def comparable(scores: Sequence[Score], theirs: Sequence[Score], name: str) -> Comparable:
    """Of `theirs`, written as `name`, what can stand beside `scores`.

    Scores without digests can, as far as one knows; that is a line, too.
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
            notes.append(f"{name}: {shots} {difference}; its figures are left out")
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
        return "asked other questions (its data differ)"
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


def partial_name(path: Path) -> Path:
    """Where the scores are written before they get their name."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


def write_scores(path: Path, scores: Sequence[Score], about: dict[str, Any]) -> None:
    """Write {**about, "scores": [...]} as JSON; the file appears whole or not at all."""
    content = {**about, "scores": [asdict(score) for score in scores]}
    partial = partial_name(path)
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)


def read_written(path: Path, *, limit: int | None) -> list[Score]:
    """The scores in a file of `write_scores`, to compare with ours.

    Raises `UserError` if it is no such file, or was made with another `--limit` than ours.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores = [Score(**score) for score in content["scores"]]
    except OSError as error:
        raise UserError(f"--compare {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--compare {path}: not a file that --output wrote") from None
    if content.get("limit") != limit:
        raise UserError(
            f"--compare {path}: made with --limit {content.get('limit')}, not {limit}; the same "
            "questions are needed"
        )
    return scores
