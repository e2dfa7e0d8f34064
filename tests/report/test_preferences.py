"""Correlations of weights with scores and alignments, against numpy.corrcoef."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.report import weight_against_alignment, weight_stream
from megatron_dwm.report.score_correlation import Scores, correlate_scores
from megatron_dwm.report.weight_against_alignment import correlate_batches, map_weights
from megatron_dwm.report.weight_rows import SOURCES, WeightRows
from tests.report.random_weights import DOCUMENTS, Row, random_rows, write_rows


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stream, "BATCH_ROWS", 37)
    monkeypatch.setattr(weight_against_alignment, "_PENDING", 5)


def correlated_rows() -> list[Row]:
    """Weights that follow alignments in half of the batches, and equal ones in one of them."""
    rows = random_rows()
    for row in rows:
        if row["alignment"] is not None and row["step"] % 4 == 0:
            row["weight"] = float(np.float32(1 + row["alignment"] / (10 * row["step"])))
            row["weight"] = max(row["weight"], 0.0)
        if row["step"] == 8:
            row["weight"] = 1.0
    return rows


def aligned(rows: list[Row]) -> dict[tuple[int, str], list[Row]]:
    found: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        if row["alignment"] is not None:
            found.setdefault((row["step"], row["source"]), []).append(row)
    return found


def pairs(rows: list[Row]) -> np.ndarray:
    return np.array([[row["weight"], row["alignment"]] for row in rows], dtype=np.float64).T


def test_correlation_of_each_batch(tmp_path: Path) -> None:
    rows = correlated_rows()
    found = correlate_batches(WeightRows.open(write_rows(tmp_path, rows)))
    expected = aligned(rows)
    keys = sorted(expected, key=lambda key: (key[0], SOURCES.index(key[1])))
    assert found.step_B.tolist() == [step for step, _ in keys]
    for at, key in enumerate(keys):
        batch = pairs(expected[key])
        assert found.rows_B[at] == batch.shape[1]
        assert found.alignment_mean_B[at] == pytest.approx(batch[1].mean())
        if batch.shape[1] == 1 or key[0] == 8:
            assert np.isnan(found.correlation_B[at])
        else:
            expected_r = np.corrcoef(batch)[0, 1]
            assert found.correlation_B[at] == pytest.approx(expected_r, abs=1e-9)
            assert found.alignment_std_B[at] == pytest.approx(batch[1].std())


def test_the_map_counts_every_aligned_row(tmp_path: Path) -> None:
    rows = correlated_rows()
    files = WeightRows.open(write_rows(tmp_path, rows))
    found = map_weights(files, correlate_batches(files))
    assert found is not None
    standard, weights = [], []
    for batch in aligned(rows).values():
        weight, alignment = pairs(batch)
        if alignment.std() > 0:
            standard += ((alignment - alignment.mean()) / alignment.std()).tolist()
            weights += weight.tolist()
    clipped = np.clip(standard, *(found.alignment_edges[[0, -1]] * (1 - 1e-12)))
    expected, *_ = np.histogram2d(clipped, weights, [found.alignment_edges, found.weight_edges])
    assert found.counts_AW.sum() == len(weights)
    # A value on a border may fall on either side.
    assert np.abs(found.counts_AW - expected).sum() <= 2
    column = np.digitize(clipped, found.alignment_edges) - 1
    quantiles, width = found.quantiles([0.05, 0.5, 0.95]), np.diff(found.weight_edges)[0]
    for at, mean in enumerate(found.mean_weight_A):
        inside = np.array(weights)[column == at]
        if len(inside):
            assert mean == pytest.approx(inside.mean())
            expected_q = np.quantile(inside, [0.05, 0.5, 0.95], method="inverted_cdf")
            assert np.abs(quantiles[at] - expected_q).max() <= width
        else:
            assert np.isnan(mean) and np.isnan(quantiles[at]).all()


def test_runs_without_alignments_have_no_map(tmp_path: Path) -> None:
    rows = [{**row, "alignment": None} for row in random_rows()]
    files = WeightRows.open(write_rows(tmp_path, rows))
    batches = correlate_batches(files)
    assert len(batches) == 0 and map_weights(files, batches) is None


@pytest.mark.parametrize("intervals", [1, 4, 40])
def test_correlation_with_scores(tmp_path: Path, intervals: int) -> None:
    """Scores of very different size, one of them with gaps, one the same everywhere."""
    rows, random = random_rows(), np.random.default_rng(1)
    files = WeightRows.open(write_rows(tmp_path, rows))
    documents = np.arange(0, DOCUMENTS, 2)
    values = np.stack(
        [
            random.normal(1e6, 1.0, len(documents)),
            random.normal(0, 1e-6, len(documents)),
            np.full(len(documents), 3.0),
        ],
        axis=1,
    )
    values[::3, 1] = np.nan
    scores = Scores(names=("far", "tiny", "same"), document_K=documents, values_KC=values)
    found = correlate_scores(files, scores, 2, 60, intervals)
    edges = np.linspace(2, 61, min(intervals, 59) + 1)
    at = 0
    for first, stop in zip(edges[:-1], edges[1:], strict=True):
        inside = [
            row
            for row in rows
            if first <= row["step"] < stop
            and row["source"] != "target"
            and row["document_id"] % 2 == 0
        ]
        if not inside:
            continue
        assert found.step_T[at] == pytest.approx(np.mean([row["step"] for row in inside]))
        for column, name in enumerate(scores.names):
            pairs = [(r["weight"], values[r["document_id"] // 2, column]) for r in inside]
            known = np.array([pair for pair in pairs if pair[1] == pair[1]]).reshape(-1, 2).T
            assert found.rows_TC[at, column] == known.shape[1]
            if name == "same" or known.shape[1] < 3 or known[1].std() == 0:
                assert np.isnan(found.correlation_TC[at, column])
            else:
                expected = np.corrcoef(known)[0, 1]
                assert found.correlation_TC[at, column] == pytest.approx(expected, abs=1e-6)
        at += 1
    assert at == len(found.step_T)


def test_no_scores(tmp_path: Path) -> None:
    files = WeightRows.open(write_rows(tmp_path, random_rows()))
    nothing = Scores(names=("a",), document_K=np.zeros(0, int), values_KC=np.zeros((0, 1)))
    assert len(correlate_scores(files, nothing, 2, 60).step_T) == 0
