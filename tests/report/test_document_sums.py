"""Sums and credits of documents against dictionaries, row by row."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_dwm.report import document_sums, weight_stream
from megatron_dwm.report.corpus import Corpus
from megatron_dwm.report.credit import count_updates, credit_by_domain, write_credit
from megatron_dwm.report.document_sums import DocumentSums, sum_documents
from megatron_dwm.report.documents import most_and_least
from megatron_dwm.report.learning_rates import LearningRates
from megatron_dwm.report.runs import Run
from megatron_dwm.report.weight_rows import WeightRows
from tests.report.random_weights import (
    LENGTH,
    ROWS,
    Row,
    learning_rate,
    metric_lines,
    random_rows,
    write_rows,
)

TOKENS = ROWS * LENGTH
RATES = LearningRates.of(metric_lines())
# Sums of a few hundred numbers in float64, in another order.
CLOSE = {"rel": 1e-9, "abs": 1e-15}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stream, "BATCH_ROWS", 37)
    monkeypatch.setattr(document_sums, "_PENDING", 50)


def by_hand(rows: list[Row]) -> dict[str, float]:
    """The sums of one document's rows."""
    found: dict[str, float] = defaultdict(float)
    for row in rows:
        found["rows"] += 1
        found["tokens"] += row["tokens"]
        found["weight"] += row["tokens"] * row["weight"]
        if row["alignment"] is not None:
            # The virtual step of a fresh update would be the next one; the last has no line.
            step = min(row["step"] + (row["source"] == "update"), 60)
            found["aligned"] += 1
            found["alignment"] += row["alignment"]
            credit = learning_rate(step) * row["alignment"]
            found["credit"] += credit
            found["drop"] += credit * row["weight"] * row["tokens"] / TOKENS
    return found


def grouped(rows: list[Row], *names: str) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row["source"] != "target":
            found[tuple(row[name] for name in names)].append(row)
    return found


def assert_sums(sums: DocumentSums, at: int, expected: dict[str, float]) -> None:
    assert (sums.rows_K[at], sums.tokens_K[at]) == (expected["rows"], expected["tokens"])
    assert sums.aligned_K[at] == expected["aligned"]
    mean = expected["weight"] / expected["tokens"]
    assert sums.weight_K[at] == pytest.approx(mean, **CLOSE)
    assert sums.credit_K[at] == pytest.approx(expected["credit"], **CLOSE)
    assert sums.drop_K[at] == pytest.approx(expected["drop"], **CLOSE)
    if expected["aligned"]:
        alignment = expected["alignment"] / expected["aligned"]
        assert sums.alignment_K[at] == pytest.approx(alignment, **CLOSE)
    else:
        assert np.isnan(sums.alignment_K[at])


def summed(tmp_path: Path, rows: list[Row]) -> tuple[DocumentSums, tuple[str, ...]]:
    files = WeightRows.open(write_rows(tmp_path, rows))
    return sum_documents(files, RATES, TOKENS), files.domains


def test_sums_by_document_and_stage(tmp_path: Path) -> None:
    rows = random_rows()
    sums, domains = summed(tmp_path, rows)
    expected = grouped(rows, "document_id", "stage")
    keys = list(zip(sums.document_K.tolist(), sums.stage_K.tolist(), strict=True))
    assert keys == sorted(expected) and sums.stages == [1, 2, 3]
    for at, key in enumerate(keys):
        assert_sums(sums, at, by_hand(expected[key]))
        assert domains[sums.domain_K[at]] == expected[key][0]["domain"]


def test_sums_over_the_stages(tmp_path: Path) -> None:
    rows = random_rows()
    sums = summed(tmp_path, rows)[0].over_stages()
    expected = grouped(rows, "document_id")
    assert sums.document_K.tolist() == sorted(document for (document,) in expected)
    for at, document in enumerate(sums.document_K.tolist()):
        assert_sums(sums, at, by_hand(expected[document,]))


def test_credit_by_domain(tmp_path: Path) -> None:
    rows = random_rows()
    sums, domains = summed(tmp_path, rows)
    found = credit_by_domain(sums.over_stages(), domains)
    expected = grouped(rows, "domain")
    assert {each.domain for each in found} == {domain for (domain,) in expected}
    assert [each.credit for each in found] == sorted((e.credit for e in found), reverse=True)
    for each in found:
        hand = by_hand(expected[each.domain,])
        assert (each.rows, each.aligned) == (hand["rows"], hand["aligned"])
        assert each.documents == len({r["document_id"] for r in expected[each.domain,]})
        assert each.credit == pytest.approx(hand["credit"], **CLOSE)
        assert each.drop == pytest.approx(hand["drop"], **CLOSE)
        assert each.weight == pytest.approx(hand["weight"] / hand["tokens"], **CLOSE)
    assert count_updates(metric_lines()) == 10


def test_the_file_of_credits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_dwm.report.credit._CHUNK", 7)
    rows = random_rows()
    sums, domains = summed(tmp_path, rows)
    path = tmp_path / "credit.parquet"
    write_credit(
        path, sums.over_stages(), domains, Corpus.open(Run(name="run", path=tmp_path, metrics=[]))
    )
    expected = grouped(rows, "document_id")
    found = pq.read_table(path).to_pylist()
    assert [row["document_id"] for row in found] == sorted(d for (d,) in expected)
    for row in found:
        hand = by_hand(expected[row["document_id"],])
        assert row["domain"] == expected[row["document_id"],][0]["domain"]
        assert row["times_recorded"] == hand["rows"]
        assert row["times_in_updates"] == hand["aligned"] and row["tokens"] == hand["tokens"]
        assert row["source_file"] is row["record"] is None, "there is no sidecar"
        if hand["aligned"]:
            assert row["credit"] == pytest.approx(hand["credit"], **CLOSE)
            assert row["loss_drop"] == pytest.approx(hand["drop"], **CLOSE)
        else:
            assert row["credit"] is row["loss_drop"] is row["mean_alignment"] is None


def test_without_rates_and_shares(tmp_path: Path) -> None:
    files = WeightRows.open(write_rows(tmp_path, random_rows()))
    sums = sum_documents(files, None, None)
    assert (sums.credit_K == 0).all() and np.isnan(sums.drop_K).all()
    assert LearningRates.of([{"phase": "train", "step": 1}]) is None
    assert credit_by_domain(sums.over_stages(), files.domains)[0].drop is None


def test_a_run_without_rows(tmp_path: Path) -> None:
    sums = sum_documents(WeightRows.open(tmp_path), RATES, TOKENS)
    assert len(sums) == len(sums.over_stages()) == 0 and sums.stages == []
    write_credit(
        tmp_path / "credit.parquet",
        sums,
        (),
        Corpus.open(Run(name="run", path=tmp_path, metrics=[])),
    )
    assert len(pq.read_table(tmp_path / "credit.parquet")) == 0


def test_rates_of_skipped_steps() -> None:
    lines = [{"phase": "train", "step": step, "lr": step / 10} for step in (5, 1, 2)]
    rates = LearningRates.of(lines)
    assert rates is not None
    assert rates.at(np.array([0, 1, 2, 3, 5, 9])).tolist() == [0.1, 0.1, 0.2, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("by", ["weight", "alignment", "credit"])
@pytest.mark.parametrize("count", [1, 4, 1000])
def test_most_and_least_wanted(tmp_path: Path, by: str, count: int) -> None:
    sums = summed(tmp_path, random_rows())[0].over_stages()
    chosen = most_and_least(sums, count, by)  # type: ignore[arg-type]
    values = {"weight": sums.weight_K, "alignment": sums.alignment_K, "credit": sums.credit_K}[by]
    known = [at for at in range(len(sums)) if by == "weight" or sums.aligned_K[at]]
    order = sorted(known, key=lambda at: -values[at])
    upper = min(count, (len(order) + 1) // 2)
    lower = min(count, len(order) - upper)
    assert chosen["most"].tolist() == order[:upper]
    assert chosen["least"].tolist() == order[::-1][:lower]


def test_equal_weights_are_in_the_order_of_documents() -> None:
    ones = np.ones(9)
    columns = dict.fromkeys(DocumentSums.__dataclass_fields__, ones) | {
        "document_K": np.arange(9),
        "weight_K": np.array([1.0, 2, 2, 2, 1, 2, 1, 1, 1]),
    }
    chosen = most_and_least(DocumentSums(**columns), 2)
    assert chosen["most"].tolist() == [1, 2] and chosen["least"].tolist() == [0, 4]
