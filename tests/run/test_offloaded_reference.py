"""Runs whose reference waits in host memory are those of a reference that stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints
from tests.run.test_blade import METHOD
from tests.small_runs.command import RESUME
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same

OFFLOAD = ["--policy.offload_reference", "true"]
SAVE = ["--training.checkpoint_interval_steps", "2", "--training.checkpoint_async", "true"]
LAYOUTS = [
    ([], 1),
    (["--model.precision", "bf16"], 1),
    (["--parallel.pipeline", "2"], 2),
    (["--parallel.sharded_optimizer", "true"], 2),
]


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS, ids=str)
def test_blade_is_the_same_bit_for_bit_also_saved_and_resumed(
    server: Server, corpus: Corpus, tmp_path: Path, layout: list[str], ranks: int
) -> None:
    """Stopped inside the reference's steps, and gone on from a checkpoint of them."""
    arguments = [*corpus.arguments(), *METHOD, *layout, *SAVE]
    stays, waits = tmp_path / "stays", tmp_path / "waits"
    server.succeed(stays, arguments, ranks=ranks)
    stop = {"name": "send_signal", "place": "weighting", "call": 2, "number": 15, "rank": 0}
    server.succeed(waits, [*arguments, *OFFLOAD], ranks=ranks, fault=stop)
    server.succeed(waits, [*arguments, *OFFLOAD, *RESUME], ranks=ranks)
    assert_same(waits, stays)


def test_excess_loss_is_the_same_and_may_change_where_the_reference_waits(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    server.succeed(tmp_path / "model", [*corpus.arguments(), "--training.steps", "2"])
    reference = ["--policy.reference", str(list_checkpoints(tmp_path / "model")[-1])]
    method = ["--policy.name", "excess_loss", *reference, "--training.steps", "6"]
    arguments = [*corpus.arguments(), *method, *SAVE]
    server.succeed(tmp_path / "stays", arguments)
    stop = {"name": "send_signal", "place": "training", "call": 3, "number": 15, "rank": 0}
    server.succeed(tmp_path / "waits", arguments, fault=stop)
    server.succeed(tmp_path / "waits", [*arguments, *OFFLOAD, *RESUME])
    assert_same(tmp_path / "waits", tmp_path / "stays")


def test_without_a_reference_the_key_has_no_effect(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    job = server.run(tmp_path / "run", [*corpus.arguments(), "--policy.name", "dwm", *OFFLOAD])
    assert job.codes == [2]
    assert "policy.offload_reference: has no effect: policy dwm has no second LLM" in job.text
