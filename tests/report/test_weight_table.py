"""examples/weight_table.py: the means of runs that wrote several files of weights."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.forking.client import run_python

NAMES = pa.dictionary(pa.int32(), pa.string())


def write(directory: Path, step: int, domains: list[str], weights: list[float]) -> None:
    """Write one file of weights, with the names of its own domains alone."""
    directory.mkdir(parents=True, exist_ok=True)
    columns = {
        "step": pa.array([step] * len(domains), pa.int64()),
        "domain": pa.array(domains).dictionary_encode().cast(NAMES),
        "tokens": pa.array([3, 1][: len(domains)], pa.int32()),
        "weight": pa.array(weights, pa.float32()),
    }
    pq.write_table(pa.table(columns), directory / f"steps_{step}.parquet")


def test_files_with_different_domains(tmp_path: Path) -> None:
    weights = tmp_path / "document.1" / "weights"
    write(weights, 10, ["junk", "prose"], [9.0, 9.0])
    write(weights, 39, ["prose", "prose"], [1.0, 2.0])
    write(weights, 40, ["code", "prose"], [0.5, 1.0])
    (tmp_path / "sample.1" / "weights").mkdir(parents=True)  # a run at its beginning
    done = run_python(["examples/weight_table.py", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert rows[0] == "| mean weight | code | prose |"
    assert rows[2:] == ["| document | 0.50 | 1.20 |"]


def test_a_folder_without_runs(tmp_path: Path) -> None:
    done = run_python(["examples/weight_table.py", str(tmp_path)])
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}: no run METHOD.SEED with weights")
