"""tools/top_documents.py: its table and JSON Lines against the rows of the run, and mistakes."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from tests.forking.client import run_python
from tests.report.random_weights import DOCUMENTS, Row, learning_rate, random_rows, write_rows
from tests.small_runs.fixtures import Corpus, preprocessed


def printed(*arguments: str | Path, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    return run_python(["tools/top_documents.py", *map(str, arguments)], fresh=fresh)


def records(*arguments: str | Path) -> list[dict]:
    done = printed(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def run_dir(corpus: Corpus, tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    lines = [{"text": f"number {n}\n\nand more", "domain": "d"} for n in range(DOCUMENTS)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_dir = write_rows(tmp_path / "run", random_rows())
    data = {"train": [preprocessed(file, corpus.tokenizer).prefix], "tokenizer": corpus.tokenizer}
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"data": {**data, "domain_key": "domain"}}))
    return run_dir


def of_documents(**chosen: object) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = defaultdict(list)
    for row in random_rows():
        if row["source"] != "target" and all(row[name] == chosen[name] for name in chosen):
            found[row["document_id"]].append(row)
    return found


def mean_weight(rows: list[Row]) -> float:
    return sum(r["tokens"] * r["weight"] for r in rows) / sum(r["tokens"] for r in rows)


def credit(rows: list[Row]) -> float:
    aligned = [row for row in rows if row["alignment"] is not None]
    steps = [min(row["step"] + (row["source"] == "update"), 60) for row in aligned]
    return sum(
        learning_rate(step) * row["alignment"] for step, row in zip(steps, aligned, strict=True)
    )


def test_json_has_the_most_and_the_least_wanted(run_dir: Path) -> None:
    found = records(run_dir, "-n", 4)
    expected = of_documents()
    order = sorted(expected, key=lambda document: -mean_weight(expected[document]))
    assert [r["document"] for r in found if r["side"] == "most"] == order[:4]
    assert [r["document"] for r in found if r["side"] == "least"] == order[::-1][:4]
    for record in found:
        rows = expected[record["document"]]
        assert record["stage"] is None and record["rows"] == len(rows)
        assert record["weight"] == pytest.approx(mean_weight(rows))
        assert record["credit"] == pytest.approx(credit(rows))
        assert record["domain"] == rows[0]["domain"]
        assert record["text"] == f"number {record['document']}\n\nand more"
        assert record["record"] == record["document"] and record["source"].endswith("text.jsonl")


@pytest.mark.parametrize("stage", [1, 3])
def test_one_stage_and_one_domain(run_dir: Path, stage: int) -> None:
    found = records(run_dir, "--stage", stage, "--domain", "code", "--side", "least", "-n", 3)
    expected = of_documents(stage=stage, domain="code")
    order = sorted(expected, key=lambda document: mean_weight(expected[document]))
    assert [r["document"] for r in found] == order[:3]
    assert {(r["stage"], r["domain"], r["side"]) for r in found} == {(stage, "code", "least")}


def test_every_stage_by_credit_with_enough_rows(run_dir: Path) -> None:
    found = records(run_dir, "--stage", "each", "--by", "credit", "--min-times", 4, "-n", 2)
    for stage in (1, 2, 3):
        expected = {
            document: rows
            for document, rows in of_documents(stage=stage).items()
            if len(rows) >= 4 and any(row["alignment"] is not None for row in rows)
        }
        order = sorted(expected, key=lambda document: -credit(expected[document]))
        of_stage = [r["document"] for r in found if r["stage"] == stage and r["side"] == "most"]
        assert of_stage == order[: len(of_stage)] and of_stage


def test_the_table(run_dir: Path) -> None:
    done = printed(run_dir, "-n", 3, "--characters", 20, fresh=True)
    assert done.returncode == 0 and done.stderr == ""
    most, least = done.stdout.rstrip("\n").split("\n\n")
    assert most.splitlines()[0] == "most wanted of the run"
    assert least.splitlines()[0] == "least wanted of the run"
    headings = "rank document domain times weight alignment credit text".split()
    assert most.splitlines()[1].split() == headings
    for record, line in zip(records(run_dir, "-n", 3), most.splitlines()[2:], strict=False):
        cells = line.split()
        assert cells[:3] == [str(record["rank"]), str(record["document"]), record["domain"]]
        assert float(cells[4]) == pytest.approx(record["weight"], abs=6e-4)
        assert line.endswith(f"number {record['document']} and more")


def test_data_that_have_moved(run_dir: Path) -> None:
    (run_dir / "config.yaml").unlink()
    done = printed(run_dir, "-n", 1)
    assert done.returncode == 0 and done.stdout.count("(no text)") == 2
    assert done.stderr.startswith("note: no text of documents: data.train is empty")


def test_mistakes_are_one_line_and_exit_code_2(run_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "phase": "train"}\n')
    for arguments, message in (
        ((tmp_path / "gone",), "is not a run"),
        ((bare,), "has no weights of documents in weights/*.parquet"),
        ((run_dir, "--stage", "9"), "--stage 9: no such stage; choose each, or one of 1, 2, 3"),
        ((run_dir, "--domain", "poems"), "no domain poems in weights/*.parquet; it has "),
        ((run_dir, "--min-times", "1000"), "no document has a recorded weight in 1000"),
        ((run_dir, "-n", "0"), "number from 1 on"),
    ):
        done = printed(*arguments)
        [line] = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith("error: ") and message in line
        assert done.stdout == ""


def test_equal_weights_are_one_line(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", [{**row, "weight": 1.0} for row in random_rows()])
    done = printed(run)
    assert done.returncode == 0
    assert done.stdout == (
        "all documents of the run have the same weight, 1: none is wanted more than another\n"
    )
