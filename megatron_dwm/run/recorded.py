"""Reads the records of an earlier start of a run when the run resumes.

Records after the checkpoint are dropped, since the run writes them again. Anything that is no
record of a run (a line that was cut short by a kill, a foreign line, an unreadable file of weights)
is moved to another name and reported in one line, as damaged checkpoints are: nothing is lost, and
nothing stops the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.files.atomic import write_bytes

UPDATES = b"updates"
"""key of a Parquet file's metadata: weighting updates made when it was written"""
STEP_PHASES = ("train", "skipped")
_WEIGHTS = re.compile(r"steps_(\d+)_(\d+)(?:_\d+)?\.parquet")
_PARQUET_FOLDERS = ("weights", "token_weights")
_MAX_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line of metrics.jsonl; `number` counts from 1, `record` is None if it is no record."""

    number: int
    raw: bytes
    record: dict[str, Any] | None


def recorded_steps(run_dir: Path, phases: tuple[str, ...] = STEP_PHASES) -> list[int]:
    """Returns the steps of these phases in metrics.jsonl, in order; empty if there is no file."""
    records = (line.record for line in _lines(run_dir / "metrics.jsonl"))
    return sorted({r["step"] for r in records if r is not None and r["phase"] in phases})


def drop_records_after(run_dir: Path, state: TrainState, warn: Callable[[str], None]) -> int:
    """Remove lines and weight records after a checkpoint's state.

    Returns the number of steps that the checkpoint has and metrics.jsonl lacks. Raises OSError.
    """
    metrics = run_dir / "metrics.jsonl"
    lines = _lines(metrics)
    _set_lines_aside(metrics, [line for line in lines if line.record is None], warn)
    kept = [line for line in lines if line.record is not None and _knows(state, line.record)]
    if metrics.is_file():
        write_bytes(metrics, b"".join(line.raw + b"\n" for line in kept))
    for folder in _PARQUET_FOLDERS:
        _drop_weights(run_dir / folder, state, warn)
    records = (line.record for line in kept)
    return state.step - len({r["step"] for r in records if r and r["phase"] in STEP_PHASES})


def set_aside(file: Path, ending: str) -> Path:
    """Rename a file to a free name with `ending`, and return the new path. Raises OSError."""
    numbered = (f"{file.name}.{ending}_{number}" for number in range(1, 1000))
    names = (f"{file.name}.{ending}", *numbered)
    target = next(t for t in map(file.with_name, names) if not t.exists())
    file.rename(target)
    return target


def _lines(metrics: Path) -> list[_Line]:
    """Returns the lines that are not blank."""
    if not metrics.is_file():
        return []
    numbered = enumerate(metrics.read_bytes().split(b"\n"), start=1)
    return [_Line(number=n, raw=raw, record=_record(raw)) for n, raw in numbered if raw.strip()]


def _record(raw: bytes) -> dict[str, Any] | None:
    """Returns the record of a line, or None if no run wrote it."""
    try:
        record = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("phase"), str):
        return None
    counts = [record.get("step"), record.get("update", 0)]
    return record if all(type(count) is int for count in counts) else None


def _knows(state: TrainState, record: dict[str, Any]) -> bool:
    """True if a record is not later than a checkpoint's state."""
    if "update" in record:
        return record["update"] <= state.updates
    limit = state.evaluated_step if record["phase"] == "evaluation" else state.step
    return record["step"] <= limit


def _set_lines_aside(metrics: Path, lines: list[_Line], warn: Callable[[str], None]) -> None:
    if not lines:
        return
    target = metrics.with_name(f"{metrics.name}.damaged")
    with target.open("ab") as stream:
        stream.writelines(line.raw + b"\n" for line in lines)
    numbers = [str(line.number) for line in lines]
    more = len(numbers) - _MAX_NAMED
    what = ", ".join(numbers[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
    warn(
        f"{metrics} line{'s' if len(lines) > 1 else ''} {what}: no record of a run, or cut short; "
        f"set aside in {target.name}"
    )


def _drop_weights(folder: Path, state: TrainState, warn: Callable[[str], None]) -> None:
    for file in sorted(folder.glob("steps_*.parquet")):
        match = _WEIGHTS.fullmatch(file.name)
        if match is None:  # not ours
            continue
        updates = _updates_of(file)
        if updates is None:
            warn(
                f"{file} is damaged: it cannot be read; it is set aside as "
                f"{set_aside(file, 'damaged').name}, and the run continues without these weights"
            )
        elif max(int(match[1]), int(match[2])) > state.step or updates > state.updates:
            file.unlink()


def _updates_of(file: Path) -> int | None:
    """Returns the updates made when the file was written; None if its footer cannot be read."""
    try:
        return int((pq.read_schema(file).metadata or {}).get(UPDATES, b"0"))
    except (OSError, ValueError, pa.ArrowException):
        return None
