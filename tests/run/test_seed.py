"""What `run.seed` decides, one by one: parameters, the order of the data, that of the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from megatron_dwm.config.load import load_config
from megatron_dwm.run.inputs import open_model_and_tokenizer, open_target
from tests.small_runs.command import metrics, without_time
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

LAST_STEP = 7
Runs = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def runs(server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Of the seeds 1, 1 and 2; their updates change nothing, so the first values stay."""
    folder = tmp_path_factory.mktemp("seeds")
    arguments = [*corpus.arguments(), *corpus.held_out(), "--evaluation.at_start", "true"]
    arguments += ["--policy.name", "dwm", "--weighting.encoder", "own"]
    arguments += ["--weighting.learning_rate", "1e-30", "--logging.weights_interval_steps", "1"]
    arguments += ["--training.steps", str(LAST_STEP)]
    found = folder / "one", folder / "same", folder / "other"
    for run_dir, seed in zip(found, "112", strict=True):
        server.succeed(run_dir, [*arguments, "--run.seed", seed])
    return found


def _documents(run_dir: Path, source: str) -> list[list[int]]:
    """Document ids of every step's batch, or of every update's."""
    rows = [row for f in sorted(run_dir.glob("weights/*.parquet")) for row in _rows(f)]
    steps = sorted({row["step"] for row in rows if row["source"] == source})
    found = [
        [row["document_id"] for row in rows if (row["step"], row["source"]) == (step, source)]
        for step in steps
    ]
    assert found
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    return pq.read_table(file).to_pylist()


def test_equal_seeds_are_equal_runs(runs: Runs) -> None:
    one, same, _ = runs
    assert without_time(one) == without_time(same)
    assert _documents(one, "training") == _documents(same, "training")


def test_another_seed_is_another_model(runs: Runs) -> None:
    """The evaluation before the first step reads the same text."""
    losses = [metrics(run_dir, "evaluation")[0]["domain_loss"] for run_dir in runs]
    assert losses[0] == losses[1] and losses[0].keys() == losses[2].keys()
    assert all(losses[0][name] != losses[2][name] for name in losses[0])


def test_another_seed_is_another_order_of_the_data(runs: Runs) -> None:
    one, _, other = runs
    for source in ("training", "update"):
        pairs = zip(_documents(one, source), _documents(other, source), strict=True)
        assert all(ours != theirs for ours, theirs in pairs)


def test_an_updates_batch_is_not_that_of_a_step(runs: Runs) -> None:
    """With `weighting.update_on fresh`, which the first run has."""
    steps, updates = (_documents(runs[0], source) for source in ("training", "update"))
    assert not [batch for batch in updates if batch in steps]


def test_another_seed_is_another_weighting_model(runs: Runs) -> None:
    one, same, other = (
        load_file(run_dir / "weighting" / "stage_1" / "weighting.safetensors") for run_dir in runs
    )
    matrices = [name for name, value in one.items() if value.ndim > 1 and np.ptp(value) > 0]
    assert matrices
    for name in matrices:
        assert np.array_equal(one[name], same[name]), name
        assert not np.array_equal(one[name], other[name]), name


def test_another_seed_is_another_order_of_the_target(corpus: Corpus) -> None:
    def first_rows(seed: str) -> np.ndarray:
        arguments = [*corpus.arguments(), "--policy.name", "dwm", "--run.seed", seed]
        config = load_config(arguments)
        target = open_target(config, open_model_and_tokenizer(config)[0])
        assert target is not None
        return target.batch(0, 8).tokens_BS.numpy()

    assert np.array_equal(first_rows("1"), first_rows("1"))
    assert not np.array_equal(first_rows("1"), first_rows("2"))
