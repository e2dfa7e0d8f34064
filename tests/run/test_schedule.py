"""Runs whose shares of two data sets change by step: resumed, split over processes, refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same, wait_for_step

STEPS = 12
POINTS = ["0=1,0", "4=1,1", "8=0.001,0.999"]
ANNEAL = ["--data.schedule_interpolation", "linear", "--data.schedule", "0=9,1", "8=9,1", "12=1,9"]
METHODS = {
    "constant, uniform": ["--data.schedule", *POINTS],
    "linear, uniform": ANNEAL,
    "curriculum": [*ANNEAL, "--policy.name", "curriculum", "--policy.pacing_start", "0.2"],
    "fixed": [*ANNEAL, "--policy.name", "fixed", "--policy.column", "tokens"],
    "fresh updates": [*ANNEAL, "--policy.name", "dwm", "--weighting.update_on", "fresh"],
    "validation mixing": [*ANNEAL, "--policy.name", "validation_mixing"],
}
# Sums in another order are 1e-7 apart; a few steps of Adam may multiply that.
LAYOUT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def arguments(corpus: Corpus, short: Corpus) -> list[str]:
    """Options of a run on two data sets that records every weight and saves at step 4."""
    return [
        *corpus.arguments(),
        *("--data.train", corpus.prefix, short.prefix),
        *("--training.steps", str(STEPS), "--logging.weights_interval_steps", "1"),
        *("--training.checkpoint_interval_steps", "4"),
    ]


def second_by_step(run_dir: Path, source: str, border: int) -> dict[int, int]:
    """The samples of the second data set in each global batch, by the record of the weights."""
    counts: dict[int, int] = {}
    for file in sorted((run_dir / "weights").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            if row["source"] == source:
                counts.setdefault(row["step"], 0)
                counts[row["step"]] += row["document_id"] >= border
    return counts


def documents(prefix: str) -> int:
    return pq.read_metadata(f"{prefix}.meta.parquet").num_rows


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_bit_for_bit(
    server: Server, arguments: list[str], corpus: Corpus, tmp_path: Path, name: str
) -> None:
    """SIGKILL between two points, in the middle of the checkpoint's interval."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    mine = [*arguments, *METHODS[name]]
    server.succeed(whole, mine)
    job = server.start(resumed, mine)
    wait_for_step(job, resumed, 6)
    job.kill()
    assert 4 <= read_manifest(list_checkpoints(resumed)[-1]).state.step < STEPS
    server.succeed(resumed, [*mine, *RESUME])
    assert_same(resumed, whole)
    by_step = second_by_step(whole, "training", documents(corpus.prefix))
    if name == "constant, uniform":
        # Of 32 samples with the share 0.001 one is taken at once, when none is behind.
        assert list(by_step.values()) == [0, 0, 0, 0, 4, 4, 4, 4, 7, 8, 8, 8]
    if name == "fresh updates":
        # After 5, 8 and 11 steps; the shares of the second are 0.1, 0.1 and then 0.7 of 8 samples.
        updates = second_by_step(whole, "update", documents(corpus.prefix))
        assert list(updates.values()) == [1, 1, 5]


def test_processes_read_what_one_reads(
    server: Server, arguments: list[str], corpus: Corpus, tmp_path: Path
) -> None:
    mine = [*arguments, *ANNEAL]
    server.succeed(tmp_path / "one", mine)
    server.succeed(tmp_path / "two", mine, ranks=2)
    border = documents(corpus.prefix)
    one, two = (second_by_step(tmp_path / name, "training", border) for name in ("one", "two"))
    assert one == two and one[1] < one[STEPS]
    for line, other in zip(
        metrics(tmp_path / "one", "train"), metrics(tmp_path / "two", "train"), strict=True
    ):
        assert abs(line["loss"] - other["loss"]) < LAYOUT_TOLERANCE, line["step"]


def test_a_changed_schedule_is_refused_and_can_be_allowed(
    server: Server, arguments: list[str], tmp_path: Path
) -> None:
    """Also if only later steps change. If that is allowed, the run reads what was planned."""
    planned, run_dir = tmp_path / "planned", tmp_path / "run"
    later = ["--data.schedule", "0=3,1", "9=1,9"]
    server.succeed(planned, [*arguments, *later])
    server.succeed(run_dir, [*arguments, "--data.schedule", "0=3,1", "--training.steps", "4"])
    shutil.copytree(run_dir, tmp_path / "other")
    job = server.run(run_dir, [*arguments, *later, *RESUME])
    assert job.codes == [2]
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert "data.schedule: the run in" in line and "--run.allow_changed data.schedule" in line
    server.succeed(run_dir, [*arguments, *later, *RESUME, "--run.allow_changed", "data.schedule"])
    # The rate follows the steps of the run, which had another end, so only the samples are equal.
    records = [
        pq.read_table(sorted((folder / "weights").glob("*.parquet"))).select(
            ["step", "document_id"]
        )
        for folder in (run_dir, planned)
    ]
    assert records[0] == records[1]
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["data"]["schedule"] == {0: [3.0, 1.0], 9: [1.0, 9.0]}
    short = ["--training.steps", "9", "--run.allow_changed", "data.schedule"]
    job = server.run(tmp_path / "other", [*arguments, *later, *RESUME, *short])
    assert job.codes == [2] and "data.schedule 9: this point is beyond the run" in job.text


@pytest.mark.parametrize("name", ["curriculum", "fixed"])
def test_methods_read_the_values_of_a_prefix_that_is_named_twice(
    server: Server, arguments: list[str], corpus: Corpus, short: Corpus, tmp_path: Path, name: str
) -> None:
    """Its documents count once: the run is the one in which it is named once."""
    policy = METHODS[name][len(ANNEAL) :]
    first, second = corpus.prefix, short.prefix
    twice = ["--data.train", "0.25", first, "0.5", second, "0.25", first, *policy]
    once = ["--data.train", "0.5", first, "0.5", second, *policy]
    server.succeed(tmp_path / "twice", [*arguments, *twice])
    server.succeed(tmp_path / "once", [*arguments, *once])
    assert_same(tmp_path / "twice", tmp_path / "once")
