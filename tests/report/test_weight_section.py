"""Weights on the page: of which rows and steps they are, and rows that are left out."""

from __future__ import annotations

import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.report.content import Content
from megatron_dwm.report.run_report import Request, contents_of, read_runs
from tests.report.random_weights import Row, random_rows, write_rows


def weights_of(run: Path) -> Content:
    contents = contents_of(read_runs(Request(run_dir=run)))
    return next(content for content in contents if content.id == "weights")


def means(rows: list[Row]) -> dict[str, float]:
    by_domain: dict[str, list[float]] = {}
    for row in rows:
        by_domain.setdefault(row["domain"], []).append(row["weight"])
    return {name: sum(values) / len(values) for name, values in by_domain.items()}


def test_last_weights_are_those_of_the_last_tenth_of_the_trained_steps(tmp_path: Path) -> None:
    """Of 30 recorded steps the last three; updates between them do not count."""
    rows = random_rows()
    table = weights_of(write_rows(tmp_path / "run", rows)).tables[0]
    last = [row for row in rows if row["step"] >= 56 and row["source"] != "update"]
    assert dict(table.rows) == pytest.approx(means(last), rel=1e-6)
    assert "steps 56 to 60" in table.caption and "trained on" in table.caption


def test_figures_have_no_rows_of_updates(tmp_path: Path) -> None:
    rows = random_rows()
    figure = weights_of(write_rows(tmp_path / "run", rows)).figures[0]
    columns = (figure.data[name] for name in ("domain", "step", "weight"))
    at = {(name, step): weight for name, step, weight in zip(*columns, strict=True)}
    trained = means([row for row in rows if row["step"] == 6 and row["source"] != "update"])
    assert {name: at[name, 6] for name in trained} == pytest.approx(trained, rel=1e-6)


def test_a_run_with_weights_of_updates_alone_has_a_note(tmp_path: Path) -> None:
    rows = [row for row in random_rows() if row["source"] == "update"]
    content = weights_of(write_rows(tmp_path / "run", rows))
    assert not content.tables and "all of samples that updates drew" in content.notes[0]


def test_a_name_without_rows_and_weights_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    rows = [{**row, "domain": "books"} for row in random_rows()]
    rows[0]["weight"] = float("nan")
    run = write_rows(tmp_path / "run", rows, files=1)
    [path] = (run / "weights").iterdir()
    table = pq.read_table(path)
    names = pa.DictionaryArray.from_arrays(pa.array([0] * len(rows), pa.int32()), ["books", "no"])
    pq.write_table(table.set_column(table.column_names.index("domain"), "domain", names), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = weights_of(run)
    assert [row[0] for row in content.tables[0].rows] == ["books"]
    assert "run: 1 recorded weights are not finite numbers and left out." in content.notes
