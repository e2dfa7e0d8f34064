"""Reads `metrics.jsonl` of a run; weight_stream.py reads its weights.

A run may be read while it is still writing: an unfinished last line is ignored. If a step was
written twice (the run was killed after it and resumed before it), the last record counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dwm.config.errors import UserError

# Of lines of metrics.jsonl; each may be missing or null.
_NUMBERS = ("loss", "tokens", "seconds", "flops", "flops_weighting", "flops_updates")


class NotYet(UserError):
    """A run has written nothing to report on yet."""


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`, one for each phase and step, sorted by step.

    Raises:
        UserError: `run_dir` is not a run, or a line is broken; `NotYet` if it has just begun.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file() and (run_dir / "config.yaml").is_file():
        raise NotYet(f"{path} is not there yet; wait for the run's first step")
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run: it has no metrics.jsonl; name a run's directory")
    latest: dict[tuple[str, int, int], dict[str, Any]] = {}
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.endswith(b"\n"):
                break  # still being written
            if raw.strip():
                record = _record(raw, f"{path} line {number}")
                # Several weighting updates share a step; each is kept.
                update = number if record["phase"] in ("weighting", "skipped_update") else 0
                latest[record["phase"], record["step"], update] = record
    if not latest:
        raise NotYet(f"{path} has no finished line yet; wait for the run's first step")
    return sorted(latest.values(), key=lambda record: record["step"])


def ends_unfinished(run_dir: Path) -> bool:
    """Returns True if the last line of `metrics.jsonl` has no end: the run is writing it."""
    with (run_dir / "metrics.jsonl").open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 1))
        return stream.read(1) not in (b"", b"\n")


def _record(raw: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise UserError(
            f"{where} is not JSON ({error}); remove the line if it was cut short"
        ) from error
    if not isinstance(record, dict) or not {"step", "phase"} <= set(record):
        raise UserError(f"{where} has no step and phase; expected a line that a run wrote")
    _check_values(record, where)
    return record


def _check_values(record: dict[str, Any], where: str) -> None:
    """Check what every figure takes for granted; raises UserError."""
    wrong = None
    if not isinstance(record["step"], int) or isinstance(record["step"], bool):
        wrong = f"step {record['step']!r}, expected a whole number"
    elif not isinstance(record["phase"], str):
        wrong = f"phase {record['phase']!r}, expected a word"
    elif not isinstance(record.get("domain_loss"), dict | None):
        wrong = f"domain_loss {record['domain_loss']!r}, expected losses by domain"
    for name in _NUMBERS:
        if not isinstance(record.get(name), int | float | None):
            wrong = f"{name} {record[name]!r}, expected a number"
    if wrong is not None:
        raise UserError(f"{where} has {wrong}, as a run writes it")
