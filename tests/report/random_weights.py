"""Weights of a run with random numbers, and the same rows as dictionaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DOMAINS = ("books", "code", "junk")
ROWS = 8
LENGTH = 32
DOCUMENTS = 30

Row = dict[str, Any]


def random_rows(seed: int = 0, steps: int = 60, stages: int = 3) -> list[Row]:
    """Rows of every second step, and of an update before every sixth; half of those are aligned."""
    random = np.random.default_rng(seed)
    rows: list[Row] = []
    for step in range(2, steps + 1, 2):
        stage = (step - 1) * stages // steps + 1
        rows += _batch(random, step, stage, "training", aligned=step % 4 == 0)
        if step % 6 == 0:
            rows += _batch(random, step, stage, "update", aligned=True)
    return rows


def _batch(
    random: np.random.Generator, step: int, stage: int, source: str, *, aligned: bool
) -> list[Row]:
    found = []
    for number in range(ROWS):
        document = int(random.integers(DOCUMENTS))
        # Two target passages a batch: their document ids are those of passages.
        of_target = source == "training" and number >= ROWS - 2
        alignment = float(np.float32(random.normal(0.3, 2.0 * step)))
        found.append(
            {
                "step": step,
                "stage": stage,
                "source": "target" if of_target else source,
                "sample_id": step * ROWS + number,
                "document_id": document,
                "domain": "target" if of_target else DOMAINS[document % len(DOMAINS)],
                "tokens": int(random.integers(1, LENGTH + 1)),
                "loss": float(np.float32(random.normal(5.0, 1.0))),
                "weight": float(np.float32(random.lognormal(0.0, 0.5))),
                "alignment": alignment if aligned and number % 2 == 0 else None,
            }
        )
    return found


def learning_rate(step: int) -> float:
    """Of a step, from 1."""
    return 1e-3 / step


def metric_lines(steps: int = 60) -> list[Row]:
    """Lines of steps and updates of metrics.jsonl."""
    lines: list[Row] = []
    for step in range(1, steps + 1):
        lines.append(
            {"step": step, "stage": 1, "phase": "train", "loss": 5.0, "lr": learning_rate(step)}
        )
        if step % 6 == 0:
            lines.append({"step": step, "phase": "weighting", "update": 1, "alignment_mean": 0.1})
    return lines


def write_rows(run_dir: Path, rows: list[Row], files: int = 3) -> Path:
    """Write a run of these rows, a file for every part of the steps."""
    (run_dir / "weights").mkdir(parents=True, exist_ok=True)
    lines = metric_lines()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = sorted({row["step"] for row in rows})
    for part in np.array_split(steps, files):
        chosen = [row for row in rows if row["step"] in set(part.tolist())]
        name = f"steps_{part[0]:08d}_{part[-1]:08d}.parquet"
        pq.write_table(table_of(chosen), run_dir / "weights" / name)
    return run_dir


def table_of(rows: list[Row]) -> pa.Table:
    """The rows with the types of a run's files."""
    table = pa.Table.from_pylist(rows)
    names = pa.dictionary(pa.int32(), pa.string())
    types = {"source": names, "domain": names, "stage": pa.int32(), "tokens": pa.int32()}
    types |= dict.fromkeys(("loss", "weight", "alignment"), pa.float32())
    fields = [pa.field(f.name, types.get(f.name, f.type)) for f in table.schema]
    return table.cast(pa.schema(fields))
