"""Streaming over weights/*.parquet: every row once, whatever the files are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.report import weight_stream
from megatron_dwm.report.weight_rows import SOURCES, WeightRows
from tests.report.random_weights import Row, random_rows, table_of, write_rows


def rows_read(run_dir: Path) -> list[tuple]:
    weights = WeightRows.open(run_dir)
    found = []
    for rows in weights.batches():
        columns = [getattr(rows, field.name).tolist() for field in dataclasses.fields(rows)]
        found += list(zip(*columns, strict=True))
    names = weights.domains
    return [(s, t, SOURCES[c], d, names[n], *rest) for s, t, c, d, n, *rest in found]


def as_read(row: Row) -> tuple:
    names = ("step", "stage", "source", "document_id", "domain", "tokens", "weight", "alignment")
    return tuple(row[name] for name in names)


def assert_rows(found: list[tuple], rows: list[Row]) -> None:
    found = [tuple(None if v != v else v for v in row) for row in found]
    assert sorted(found, key=str) == sorted(map(as_read, rows), key=str)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stream, "BATCH_ROWS", 37)


def test_every_row_is_read(tmp_path: Path) -> None:
    rows = random_rows()
    weights = WeightRows.open(write_rows(tmp_path, rows))
    assert (weights.first_step, weights.last_step) == (2, 60)
    assert_rows(rows_read(tmp_path), rows)


def test_the_last_file_counts_where_a_step_is_in_several(tmp_path: Path) -> None:
    rows = random_rows()
    write_rows(tmp_path, rows)
    again = [{**row, "weight": 9.0} for row in rows if 20 <= row["step"] <= 44]
    # Only some samples of the last of these steps, as if it had been cut off between two updates.
    again = [r for r in again if r["step"] < 44 or r["sample_id"] % 2 == 0]
    pq.write_table(table_of(again), tmp_path / "weights" / "steps_9.parquet")
    replaced = {(r["step"], r["source"], r["sample_id"]) for r in again}
    kept = [r for r in rows if (r["step"], r["source"], r["sample_id"]) not in replaced]
    assert_rows(rows_read(tmp_path), kept + again)


def test_files_of_older_versions(tmp_path: Path) -> None:
    rows = random_rows()
    write_rows(tmp_path, rows, files=1)
    [path] = (tmp_path / "weights").iterdir()
    older = pq.read_table(path).select(["step", "sample_id", "domain", "weight", "alignment"])
    pq.write_table(older.append_column("new", pa.array([b"?"] * len(rows))), path)
    for found, row in zip(rows_read(tmp_path), rows, strict=True):
        step, stage, source, document, domain, tokens, weight, alignment = found
        assert (step, domain, weight) == (row["step"], row["domain"], row["weight"])
        assert (stage, document, tokens) == (1, -1, 1.0)
        assert source == ("training" if row["alignment"] is None else "update")
        assert alignment != alignment or alignment == row["alignment"]


def test_a_row_without_a_domain_is_of_an_unknown_one(tmp_path: Path) -> None:
    rows = random_rows()
    path = write_rows(tmp_path, rows, files=1) / "weights" / "steps_00000002_00000060.parquet"
    table = pq.read_table(path)
    empty = pa.array([None] * len(table), pa.string())
    pq.write_table(table.set_column(5, "domain", empty), path)
    assert {row[4] for row in rows_read(tmp_path)} == {"unknown"}
    pq.write_table(table.drop_columns("domain"), path)
    assert {row[4] for row in rows_read(tmp_path)} == {"unknown"}


def test_a_run_without_weights(tmp_path: Path) -> None:
    assert rows_read(tmp_path) == []
    (tmp_path / "weights").mkdir()
    assert rows_read(tmp_path) == []
