"""What an evaluation found: one record a figure, as a table and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task.

    standard_error: the harness's, in the metric's unit; None where it gives none.
    """

    task: str
    num_fewshot: int
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool
    num_examples: int


_HEADINGS = ("task", "shots", "metric", "better", "value", "std. error", "examples")


def format_table(scores: Sequence[Score]) -> str:
    """The scores as lines of text, one a score, under headings."""
    rows = [_HEADINGS, *(_row(score) for score in scores)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    rule = tuple("-" * width for width in widths)
    lines = [_join(row, widths) for row in (rows[0], rule, *rows[1:])]
    return "\n".join(lines)


def _row(score: Score) -> tuple[str, ...]:
    error = score.standard_error
    return (
        score.task,
        str(score.num_fewshot),
        score.metric,
        "higher" if score.higher_is_better else "lower",
        f"{score.value:.4f}",
        "-" if error is None else f"{error:.4f}",
        str(score.num_examples),
    )


def _join(row: Sequence[str], widths: Sequence[int]) -> str:
    text = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
    figures = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
    return "  ".join([*text, *figures])


def write_scores(path: Path, scores: Sequence[Score], about: dict[str, Any]) -> None:
    """Write {**about, "scores": [...]} as JSON; the file appears whole or not at all."""
    content = {**about, "scores": [asdict(score) for score in scores]}
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)
