"""token_weights/*.parquet against the other records, the corpus, and other layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from tests.small_runs.command import RESUME
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

LENGTH, ROWS, STEPS = 32, 8, 8
KEPT = round(0.6 * LENGTH)
METHOD = [
    *("--policy.name", "excess_loss", "--weighting.unit", "token"),
    *("--policy.keep_scope", "sequence", "--logging.weights_interval_steps", "2"),
    *("--training.steps", str(STEPS)),
]
# Sums in another order are 1e-7 apart; 8 steps of Adam at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def arguments(
    server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Options of a run whose reference is a checkpoint of plain training."""
    plain = tmp_path_factory.mktemp("plain") / "run"
    server.succeed(plain, [*corpus.arguments(), "--policy.name", "uniform"])
    reference = list_checkpoints(plain)[-1]
    return [*corpus.arguments(), *METHOD, "--policy.reference", str(reference)]


@pytest.fixture(scope="module")
def alone(server: Server, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    server.succeed(run_dir, arguments)
    return run_dir


def rows_of(run_dir: Path, folder: str = "token_weights") -> list[dict]:
    rows = ds.dataset(run_dir / folder).to_table().to_pylist()
    return sorted(rows, key=lambda row: (row["step"], row["sample_id"]))


def test_the_rows_of_recorded_steps(alone: Path) -> None:
    rows, weights = rows_of(alone), rows_of(alone, "weights")
    assert [row["step"] for row in rows] == [step for step in (2, 4, 6, 8) for _ in range(ROWS)]
    for name in ("step", "stage", "source", "sample_id", "document_id", "domain"):
        assert [row[name] for row in rows] == [row[name] for row in weights]
    full = [row for row in rows if row["token_ids"] is not None]
    first = {step: (step - 1) * ROWS for step in (2, 4, 6, 8)}
    assert [row["sample_id"] - first[row["step"]] for row in full] == [0, 1, 2, 3] * 4


def test_tokens_add_up_to_their_row(alone: Path) -> None:
    """The row's loss and weight in weights/ are means over its tokens."""
    for row, weight in zip(rows_of(alone), rows_of(alone, "weights"), strict=True):
        assert (row["counted"], row["kept"]) == (LENGTH, KEPT)
        if row["token_ids"] is None:
            assert row["token_weights"] is row["token_losses"] is row["token_excess"] is None
            continue
        assert np.mean(row["token_losses"]) == pytest.approx(weight["loss"], rel=1e-5)
        assert np.mean(row["token_weights"]) == pytest.approx(weight["weight"], rel=1e-5)


def test_tokens_with_the_largest_excess_are_kept(alone: Path) -> None:
    for row in rows_of(alone):
        if row["token_ids"] is not None:
            excess, weights = np.array(row["token_excess"]), np.array(row["token_weights"])
            assert (weights > 0).sum() == KEPT
            assert excess[weights > 0].min() >= excess[weights == 0].max()


def test_ids_are_those_of_the_corpus(alone: Path, corpus: Corpus) -> None:
    """Every row's ids follow one another somewhere in the .bin, or cross two documents' border."""
    ids = np.fromfile(f"{corpus.prefix}.bin", dtype=np.uint16)
    windows = {w.tobytes() for w in np.lib.stride_tricks.sliding_window_view(ids, 4)}
    for row in rows_of(alone):
        if row["token_ids"] is not None:
            found = np.lib.stride_tricks.sliding_window_view(
                np.array(row["token_ids"], dtype=np.uint16), 4
            )
            inside = [w.tobytes() in windows for w in found]
            assert sum(inside) >= len(inside) - 3 * 2, "at most two borders in 32 tokens"


@pytest.mark.parametrize(
    "layout",
    [
        ["--parallel.tensor", "2", "--parallel.sequence", "true"],
        ["--parallel.pipeline", "2"],
        ["--parallel.context", "2"],
        [],
    ],
    ids=["tensor", "pipeline", "context", "data"],
)
def test_layouts_record_the_same(
    server: Server, arguments: list[str], alone: Path, tmp_path: Path, layout: list[str]
) -> None:
    server.succeed(tmp_path / "run", [*arguments, *layout], ranks=2)
    for ours, theirs in zip(rows_of(tmp_path / "run"), rows_of(alone), strict=True):
        for name in ("step", "sample_id", "domain", "counted", "kept", "token_ids"):
            assert ours[name] == theirs[name]
        if ours["token_ids"] is not None:
            for name in ("token_losses", "token_excess"):
                assert np.abs(np.subtract(ours[name], theirs[name])).max() < LAYOUT_TOLERANCE
            differ = np.not_equal(ours["token_weights"], theirs["token_weights"])
            assert differ.sum() <= 2, "only a tie at the border may fall the other way"


def test_a_resumed_run_has_every_row_once(
    server: Server, arguments: list[str], alone: Path, tmp_path: Path
) -> None:
    """It is killed after a checkpoint, so it writes rows again that were written before."""
    saves = ["--training.checkpoint_interval_steps", "3"]
    stop = {"name": "send_signal", "place": "training", "call": 7, "number": 15, "rank": 0}
    server.succeed(tmp_path / "run", [*arguments, *saves], fault=stop)
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert 5 < read_manifest(newest).state.step < STEPS
    # As if the machine had died before this checkpoint was whole.
    (newest / "manifest.json").unlink()
    server.succeed(tmp_path / "run", [*arguments, *saves, *RESUME])
    assert rows_of(tmp_path / "run") == rows_of(alone)


def test_no_rows_in_full(server: Server, arguments: list[str], tmp_path: Path) -> None:
    server.succeed(tmp_path / "run", [*arguments, "--logging.weights_token_rows", "0"])
    rows = rows_of(tmp_path / "run")
    assert len(rows) == ROWS * STEPS / 2 and all(row["kept"] == KEPT for row in rows)
    assert all(row["token_ids"] is None for row in rows)


def test_before_a_reference_there_is_no_excess(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """BLADE begins with uniform weights, and has a reference after its first synchronization."""
    blade = ["--policy.name", "blade", "--weighting.unit", "token", "--policy.sync_first_step", "2"]
    blade += ["--policy.sync_interval_steps", "4", "--policy.reference_steps", "2"]
    blade += ["--logging.weights_interval_steps", "1", "--training.steps", "4"]
    server.succeed(tmp_path / "run", [*corpus.arguments(), *blade])
    for row in rows_of(tmp_path / "run"):
        if row["step"] <= 2:
            assert row["token_excess"] is None and row["kept"] == row["counted"] == LENGTH
        else:
            assert row["kept"] <= row["counted"]
    late = [row for row in rows_of(tmp_path / "run") if row["step"] > 2]
    assert sum(row["kept"] for row in late) < sum(row["counted"] for row in late)
    assert any(row["token_excess"] is not None for row in late)


def test_rows_of_other_units_have_no_tokens(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    options = ["--policy.name", "uniform", "--training.steps", "1"]
    server.succeed(tmp_path / "run", [*corpus.arguments(), *options])
    assert not (tmp_path / "run" / "token_weights").exists()
    refused = server.run(
        tmp_path / "other", [*corpus.arguments(), *options, "--logging.weights_token_rows", "2"]
    )
    assert refused.codes == [2] and "logging.weights_token_rows: has no effect" in refused.text
