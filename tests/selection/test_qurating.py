"""QuRating: standardized scores, and the command by a column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from megatron_dwm.selection.choice import Domains, Draw, choose
from megatron_dwm.selection.pool import open_pool
from megatron_dwm.selection.qurating import QuRatingScores
from tests.selection.conftest import Dataset, Run, pq_table, quiet, write_dataset

SEEDS = 10_000


def test_frequencies_match_exp_of_standardized_scores(tmp_path: Path) -> None:
    """Equal documents and a budget of one; an empty document counts in nothing."""
    values = [3, 9, 4, 1_000, 7, 5]
    documents = [[[1] * 8], [[2] * 8], [[3] * 8], [], [[4] * 8], [[5] * 8]]
    write_dataset(tmp_path / "d", documents, {"quality": values})
    pool = open_pool(str(tmp_path / "d"))
    scores = QuRatingScores(column="quality").scores(pool, quiet, tmp_path)
    kept = np.array([0, 1, 2, 4, 5])
    scored = np.array(values, float)[kept]
    z = (scored - scored.mean()) / scored.std()
    np.testing.assert_allclose(scores.values_D[kept], z, rtol=1e-12)
    assert scores.eligible_D.tolist() == [True, True, True, False, True, True]
    domains = Domains(names=("web",), codes_D=np.zeros(6, np.uint8))
    drawn = np.zeros(6)
    for seed in range(SEEDS):
        draw = Draw(tokens=8, seed=seed, temperature=2.0)
        drawn += choose(scores, pool.tokens_D, domains, draw)
    expected = np.exp(z / 2.0) / np.exp(z / 2.0).sum() * SEEDS
    assert drawn[3] == 0
    assert stats.chisquare(drawn[kept], expected).pvalue > 1e-4


@pytest.mark.parametrize("options", [("--top-k",), ("--temperature", 1e-9)])
def test_best_documents(dataset: Dataset, run: Run, options: tuple[object, ...]) -> None:
    """Without noise, and with noise that is nothing beside the scores."""
    output = f"{dataset.prefix}_o"
    done = run(
        *("select_data.py", "qurating", "--input", dataset.prefix, "--output-prefix", output),
        *("--column", "score", "--tokens", 2_000, *options),
    )
    assert done.returncode == 0, done.stderr
    tokens = dataset.rows.column("tokens").to_numpy()
    order = np.argsort(-dataset.rows.column("score").to_numpy())
    chosen: list[int] = []
    for document in order:
        if tokens[document] and tokens[chosen].sum() < 2_000:
            chosen.append(int(document))
    assert pq_table(f"{output}.meta.parquet").equals(dataset.rows.take(sorted(chosen)))


def test_lowest_takes_the_other_end(dataset: Dataset, run: Run) -> None:
    outputs = {}
    for option in ((), ("--lowest",)):
        outputs[option] = f"{dataset.prefix}_o{len(option)}"
        done = run(
            *("select_data.py", "qurating", "--input", dataset.prefix, "--top-k"),
            *("--output-prefix", outputs[option], "--column", "score", "--tokens", 1_000, *option),
        )
        assert done.returncode == 0, done.stderr
    best, worst = (
        pq_table(f"{output}.meta.parquet").column("score") for output in outputs.values()
    )
    assert min(best.to_pylist()) > max(worst.to_pylist())
    again = run(
        *("select_data.py", "qurating", "--input", dataset.prefix, "--top-k"),
        *("--output-prefix", outputs["--lowest",], "--column", "score", "--tokens", 1_000),
    )
    assert again.returncode == 2 and "a selection with other options" in again.stderr
