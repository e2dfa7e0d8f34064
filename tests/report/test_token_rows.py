"""Shares and histograms of recorded tokens against loops over the rows."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.report import token_rows
from megatron_dwm.report.token_rows import TokenFiles, excess_histogram, kept_shares, rows_in_full

LENGTH, ROWS, FULL = 20, 6, 2
COLUMNS = ("token_ids", "token_weights", "token_losses", "token_excess")


def random_rows(steps: int = 50) -> list[dict]:
    """The reference begins after step 10; some tokens do not count."""
    random = np.random.default_rng(3)
    rows = []
    for step in range(1, steps + 1):
        for number in range(ROWS):
            excess = random.normal(0, 1, LENGTH).astype(np.float32)
            weights = np.where(excess > 0, 2.0, 0.0)
            weights[random.random(LENGTH) < 0.1] = -1.0
            rows.append(
                {
                    "step": step,
                    "domain": str(random.choice(["books", "code", "rare"], p=[0.6, 0.39, 0.01])),
                    "document_id": number,
                    "counted": int((weights >= 0).sum()),
                    "kept": int((weights > 0).sum()),
                    "token_ids": random.integers(0, 500, LENGTH).tolist(),
                    "token_weights": weights.tolist(),
                    "token_losses": random.normal(5, 1, LENGTH).tolist(),
                    "token_excess": excess.tolist() if step > 10 else None,
                }
            )
            if number >= FULL:
                rows[-1].update(dict.fromkeys(COLUMNS))
    return rows


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(token_rows, "ROWS_IN_BATCH", 17)
    (tmp_path / "token_weights").mkdir()
    rows, lists = random_rows(), pa.list_(pa.float32())
    schema = pa.schema(
        [
            *(("step", pa.int64()), ("domain", pa.dictionary(pa.int32(), pa.string()))),
            *(("document_id", pa.int64()), ("counted", pa.int32()), ("kept", pa.int32())),
            *(("token_ids", pa.list_(pa.int32())), ("token_weights", lists)),
            *(("token_losses", lists), ("token_excess", lists)),
        ]
    )
    for number in (0, 1):
        part = pa.Table.from_pylist(rows[number::2], schema=schema)
        pq.write_table(part, tmp_path / "token_weights" / f"steps_{number}.parquet")
    return tmp_path


def test_kept_shares(run_dir: Path) -> None:
    found = kept_shares(TokenFiles.open(run_dir))
    assert found is not None
    expected: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in random_rows():
        expected[row["domain"]][0] += row["counted"]
        expected[row["domain"]][1] += row["kept"]
    assert found.domains == tuple(sorted(expected))
    for at, domain in enumerate(found.domains):
        sums = [found.counted_TD[:, at].sum(), found.kept_TD[:, at].sum()]
        assert sums == expected[domain]
    # Fifty steps in forty intervals: the first ten have two.
    assert found.step_T.tolist() == [1.5 + 2 * i for i in range(10)] + list(range(21, 51))
    first = [row for row in random_rows() if row["step"] <= 2]
    assert found.counted_TD[0].sum() == sum(row["counted"] for row in first)


def test_excess_histogram(run_dir: Path) -> None:
    found = excess_histogram(TokenFiles.open(run_dir))
    assert found is not None
    rows = [row for row in random_rows() if row["token_excess"] is not None]
    excess = np.concatenate([row["token_excess"] for row in rows]).astype(np.float32)
    weights = np.concatenate([row["token_weights"] for row in rows])
    for counts, chosen in ((found.kept, weights > 0), (found.dropped, weights == 0)):
        clipped = np.clip(excess[chosen], found.edges[0], found.edges[-1])
        assert counts.sum() == chosen.sum()
        assert np.abs(counts - np.histogram(clipped, found.edges)[0]).sum() <= 2
    assert found.kept[found.edges[1:] < 0].sum() == found.dropped[found.edges[:-1] > 0].sum() == 0
    inside = (excess >= found.edges[0]) & (excess <= found.edges[-1])
    assert inside.mean() == pytest.approx(0.99, abs=0.005)


@pytest.mark.parametrize("count", [1, 5, 10_000])
def test_rows_in_full(run_dir: Path, count: int) -> None:
    found = rows_in_full(TokenFiles.open(run_dir), count)
    full = [row for row in random_rows() if row["token_ids"] is not None]
    assert len(found) == min(count, len(full))
    for row in found:
        [expected] = [r for r in full if (r["step"], r["document_id"]) == (row.step, row.document)]
        assert row.ids == expected["token_ids"] and row.domain == expected["domain"]
        assert row.weights == expected["token_weights"]
        assert (row.excess is None) == (row.step <= 10)
    if count == 5:
        assert {row.step for row in found} >= {1, 50} or len({row.step for row in found}) == 5


def test_nothing_is_recorded(tmp_path: Path) -> None:
    files = TokenFiles.open(tmp_path)
    assert kept_shares(files) is excess_histogram(files) is None
    assert rows_in_full(files, 4) == []


def test_files_that_are_left_out(run_dir: Path) -> None:
    folder = run_dir / "token_weights"
    pq.write_table(pa.table({"step": [1]}), folder / "odd.parquet")
    (folder / "cut.parquet").write_bytes(b"PAR1")
    files = TokenFiles.open(run_dir)
    assert len(files.paths) == 2 and [n.split()[0] for n in files.notes] == [
        "cut.parquet",
        "odd.parquet",
    ]
    assert kept_shares(files) is not None
