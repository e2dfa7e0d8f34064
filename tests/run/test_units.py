"""Runs with a weight for every document: resumed bit for bit, and the records of each document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from tests.small_runs.command import RESUME
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same

LENGTH, BATCH = 64, 8
COMMON = [
    *("--policy.name", "dwm", "--weighting.unit", "document", "--weighting.warmup_steps", "3"),
    *("--data.sequence_length", str(LENGTH), "--logging.weights_interval_steps", "1"),
    *("--training.steps", "8"),
]
LLM = ["--weighting.encoder", "llm", "--weighting.group", "micro_batch"]
INSIDE = ["--weighting.update_on", "training", "--data.border_loss", "false"]
OWN = ["--weighting.encoder", "own", "--weighting.unit_share", "equal"]
# Arguments, and those of a layout of two processes.
RUNS = {
    "llm, replicas": ([*LLM, *INSIDE], []),
    "own, stages": (OWN, ["--parallel.pipeline", "2"]),
    "llm, stages": (LLM, ["--parallel.pipeline", "2"]),
    "own, replicas": (OWN, []),
}
RESUMED = ("llm, replicas", "own, stages")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def runs(
    server: Server, short: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[str]]]:
    """Every run in two processes, and its arguments."""
    folder, found = tmp_path_factory.mktemp("units"), {}
    for name, (arguments, layout) in RUNS.items():
        run_dir, whole = folder / name.replace(", ", "_"), [*short.arguments(), *COMMON]
        server.succeed(run_dir, [*whole, *arguments, *layout], ranks=2)
        found[name] = (run_dir, [*whole, *arguments, *layout])
    return found


def rows_of(run_dir: Path) -> list[Row]:
    """All rows of weights/*.parquet, in order."""
    files = sorted((run_dir / "weights").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_resumed_bit_for_bit(
    server: Server, runs: dict[str, tuple[Path, list[str]]], tmp_path: Path, name: str
) -> None:
    whole, arguments = runs[name]
    resumed = tmp_path / "resumed"
    stop = {"name": "send_signal", "place": "training", "call": 5, "number": 15, "rank": 0}
    server.succeed(resumed, arguments, ranks=2, fault=stop)
    assert 3 < read_manifest(list_checkpoints(resumed)[-1]).state.step < 8
    server.succeed(resumed, [*arguments, *RESUME], ranks=2)
    assert_same(resumed, whole)
    assert rows_of(resumed) == rows_of(whole)


def test_every_document_has_a_row(runs: dict[str, tuple[Path, list[str]]]) -> None:
    for name, (run_dir, _) in runs.items():
        steps: dict[int, list[Row]] = {}
        for row in rows_of(run_dir):
            if row["source"] == "training":
                steps.setdefault(row["step"], []).append(row)
        assert list(steps) == list(range(1, 9)), name
        for step, rows in steps.items():
            assert sum(row["tokens"] for row in rows) == BATCH * LENGTH
            samples = sorted({row["sample_id"] for row in rows})
            assert samples == list(range((step - 1) * BATCH, step * BATCH))
            assert len(rows) > BATCH and all(row["tokens"] > 0 for row in rows)
            for sample in samples:
                of_sample = [row for row in rows if row["sample_id"] == sample]
                assert sum(row["tokens"] for row in of_sample) == LENGTH
        weights = [row["weight"] for row in steps[8]]
        assert max(weights) > 1.0 > min(weights) >= 0.0, name


def test_weights_do_not_depend_on_the_layout(
    server: Server, short: Corpus, runs: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    for encoder, names in (("own", ("own, stages", "own, replicas")), ("llm", ("llm, stages",))):
        alone = tmp_path / encoder
        server.succeed(alone, [*short.arguments(), *COMMON, *RUNS[names[0]][0]])
        expected = rows_of(alone)
        for name in names:
            found = rows_of(runs[name][0])
            assert len(found) == len(expected)
            for ours, theirs in zip(found, expected, strict=True):
                numbers = ("weight", "loss", "alignment")
                assert {**ours, **dict.fromkeys(numbers)} == {**theirs, **dict.fromkeys(numbers)}
                # Sums in another order, and a few steps of Adam.
                assert ours["weight"] == pytest.approx(theirs["weight"], rel=1e-4)
                assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
