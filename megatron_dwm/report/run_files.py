"""Reads the files of a run: `metrics.jsonl` and `weights/*.parquet`.

A run may be read while it is still writing: an unfinished last line is ignored. If a step was
written twice (the run was killed after it and resumed before it), the last record counts.
Sample ids are compared only within the same `source` column.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_dwm.config.errors import UserError

_WEIGHT_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("stage", pa.int64()),
        ("source", pa.string()),
        ("sample_id", pa.int64()),
        ("domain", pa.string()),
        ("weight", pa.float32()),
    ]
)


# Of lines of metrics.jsonl; each may be missing or null.
_NUMBERS = ("loss", "tokens", "seconds", "flops", "flops_weighting", "flops_updates")


class NotYet(UserError):
    """A run has written nothing to report on yet."""


@dataclass(frozen=True, kw_only=True)
class WeightRecords:
    """N recorded weights, sorted by step."""

    step: np.ndarray
    stage: np.ndarray
    weight: np.ndarray
    domain_code: np.ndarray
    """index into `domains`"""
    domains: tuple[str, ...]
    """names, sorted"""


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


def read_weights(run_dir: Path) -> WeightRecords:
    """Returns all weights that the run recorded.

    Raises:
        UserError: the run recorded none, or a file is broken.
    """
    paths = sorted((run_dir / "weights").glob("*.parquet"))
    tables = [_weight_table(path) for path in paths]
    if not any(len(table) for table in tables):
        raise UserError(
            f"{run_dir} has no weights in weights/*.parquet: "
            "run with logging.weights_interval_steps above 0, or wait for the first checkpoint, "
            "with which they are written"
        )
    rows = pa.concat_tables(tables)
    kept = last_written(rows, np.repeat(np.arange(len(tables)), [len(t) for t in tables]))
    domains, codes = _encode(rows["domain"])
    return WeightRecords(
        step=rows["step"].to_numpy()[kept],
        stage=rows["stage"].to_numpy()[kept],
        weight=rows["weight"].to_numpy()[kept].astype(np.float64),
        domain_code=codes[kept],
        domains=domains,
    )


def last_written(rows: pa.Table, file: np.ndarray) -> np.ndarray:
    """Returns row numbers in the order of (step, source, sample), without superseded rows.

    If several files have the same sample of a step, the last file counts. No file has a step twice,
    so equal ids within one file are a passage that its batch has twice.
    """
    step, sample = rows["step"].to_numpy(), rows["sample_id"].to_numpy()
    _, source = _encode(rows["source"])
    order = np.lexsort((file, sample, source, step))
    differs = [np.diff(column[order]) != 0 for column in (step, source, sample)]
    ends = np.append(np.logical_or.reduce(differs), True)
    last_file = file[order][ends]
    number_of_sample = np.cumsum(ends) - ends
    return order[file[order] == last_file[number_of_sample]]


def _encode(column: pa.ChunkedArray) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the sorted names, and for each row the index of its name."""
    encoded = column.combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    names = tuple(sorted(found))
    index_of = np.array([names.index(name) for name in found])
    return names, index_of[encoded.indices.to_numpy()]


def _weight_table(path: Path) -> pa.Table:
    try:
        if "source" in pq.read_schema(path).names:
            table = pq.read_table(path, columns=_WEIGHT_SCHEMA.names)
        else:
            table = pq.read_table(path)
            table = table.append_column("source", guessed_source(table["alignment"]))
        return table.select(_WEIGHT_SCHEMA.names).cast(_WEIGHT_SCHEMA)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise broken_file(path, error) from error


def broken_file(path: Path, error: Exception) -> UserError:
    """Returns the error of a file that cannot be read as weights."""
    reason = str(error).splitlines()[0]
    return UserError(f"{path} has no weights of a run ({reason}); move it out of the folder")


def guessed_source(alignment: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the source column for files of older versions: `update` for rows with an alignment.

    That is wrong for updates on the training batch, but their steps have no other record.
    """
    return pc.if_else(alignment.is_null(), "training", "update")
