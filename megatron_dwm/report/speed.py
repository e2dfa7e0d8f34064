"""The speed of each step, from the clock in the lines of `metrics.jsonl`.

A line says how long the run's loop has taken so far. So the time since the line before, whatever
that was about, is the time of the step: updates between steps and evaluations have lines of their
own. A checkpoint has none, and counts to the step after it; an update inside a step, to that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPEED = "tokens_per_second"


def with_speed(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines, those of steps with `SPEED` where two clocks and two counts allow it."""
    found: list[dict[str, Any]] = []
    before: dict[str, Any] | None = None
    for line in metrics:
        speed = None if line["phase"] != "train" or before is None else _speed(before, line)
        found.append(line if speed is None else {**line, SPEED: speed})
        before = line
    return found


def _speed(before: dict[str, Any], line: dict[str, Any]) -> float | None:
    try:
        seconds = float(line["seconds"]) - float(before["seconds"])
        tokens = float(line["tokens"]) - float(before["tokens"])
    except (KeyError, TypeError, ValueError):
        return None
    return tokens / seconds if seconds > 0 and tokens > 0 else None
