"""Runs with policy blade: layouts, resumed inside and between the reference's steps, mistakes."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same, saved_step, wait_for_step

METHOD = [
    *("--policy.name", "blade", "--policy.sync_first_step", "3"),
    *("--policy.sync_interval_steps", "4", "--policy.reference_steps", "3"),
    *("--policy.reference_learning_rate", "0.003", "--training.steps", "9"),
]
TOKENS = ["--weighting.unit", "token", "--policy.keep_scope", "sequence"]
# Sums in another order are 1e-7 apart; a few steps of two Adams at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def alone(
    server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs of one process, by unit."""
    folder, found = tmp_path_factory.mktemp("blade"), {}
    for name, options in {"token": TOKENS, "sample": []}.items():
        found[name] = folder / name
        server.succeed(found[name], [*corpus.arguments(), *METHOD, *options])
    return found


@pytest.mark.parametrize(
    "layout",
    [
        ["--parallel.tensor", "2", "--parallel.sequence", "true"],
        ["--parallel.pipeline", "2"],
        ["--parallel.sharded_optimizer", "true"],
        ["--parallel.context", "2"],
    ],
    ids=str,
)
def test_layouts_train_alike(
    server: Server, corpus: Corpus, alone: dict[str, Path], tmp_path: Path, layout: list[str]
) -> None:
    run_dir = tmp_path / "run"
    server.succeed(run_dir, [*corpus.arguments(), *METHOD, *TOKENS, *layout], ranks=2)
    for phase in ("train", "weighting"):
        ours, theirs = metrics(run_dir, phase), metrics(alone["token"], phase)
        for line, other in zip(ours, theirs, strict=True):
            assert abs(line["loss"] - other["loss"]) < LAYOUT_TOLERANCE, (phase, line["step"])


def test_tensor_times_pipeline_in_bf16(
    server: Server, corpus: Corpus, alone: dict[str, Path], tmp_path: Path
) -> None:
    """Four processes, sharded, in bf16: unit roundoff 2^-9 of losses near 6.5, added up."""
    run_dir = tmp_path / "run"
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--model.precision", "bf16"]
    server.succeed(run_dir, [*corpus.arguments(), *METHOD, *layout], ranks=4)
    for phase in ("train", "weighting"):
        ours, theirs = metrics(run_dir, phase), metrics(alone["sample"], phase)
        for line, other in zip(ours, theirs, strict=True):
            assert abs(line["loss"] - other["loss"]) < 0.02, (phase, line["step"])
    assert any(line["weight_min"] == 0 for line in metrics(run_dir, "train"))


def test_killed_at_random_moments(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    """kill -9 of both ranks, until the run is near its end: it ends as the undisturbed one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    saves = ["--training.checkpoint_interval_steps", "2", "--parallel.tensor", "2"]
    arguments = [*corpus.arguments(), *METHOD, *TOKENS, *saves]
    server.succeed(whole, arguments, ranks=2)
    chance, kills = random.Random(7), 0
    while saved_step(killed) < 7 and kills < 6:
        job = server.start(killed, [*arguments, *RESUME], ranks=2)
        wait_for_step(job, killed, min(saved_step(killed) + chance.randint(1, 3), 8))
        time.sleep(chance.uniform(0.0, 0.3))
        job.kill()
        kills += 1
    server.succeed(killed, [*arguments, *RESUME], ranks=2)
    assert_same(killed, whole)


def test_the_rhythm_and_the_weights(alone: dict[str, Path]) -> None:
    run_dir = alone["token"]
    assert [line["step"] for line in metrics(run_dir, "weighting")] == [3] * 3 + [7] * 3
    for line in metrics(run_dir, "train"):
        assert line["weight_min"] == (1.0 if line["step"] <= 3 else 0.0)
    phase = metrics(run_dir, "weighting")[:3]
    assert all(line["val_loss"] > 0 and "alignment_mean" not in line for line in phase)


def test_flops_are_those_of_the_passes(alone: dict[str, Path]) -> None:
    """A forward pass is one: a step 3, later 4 with the reference's; an update 2 + 3 + 3."""
    train = metrics(alone["token"], "train")
    forward = train[0]["flops"] / 3
    spent = [line["flops"] / forward for line in train]
    assert spent[:3] == pytest.approx([3, 6, 9])
    assert spent[3] == pytest.approx(9 + 3 * 8 + 4)
    assert spent[-1] == pytest.approx(9 + 6 * 8 + 6 * 4)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("place", "call"), [("weighting", 2), ("training", 6)], ids=["inside", "between"]
)
def test_a_run_is_resumed_bit_for_bit(
    server: Server, corpus: Corpus, tmp_path: Path, ranks: int, place: str, call: int
) -> None:
    """Stopped between two of the reference's steps, and between two of the LLM's."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    sharded = ["--parallel.sharded_optimizer", "true"] if ranks == 2 else []
    arguments = [*corpus.arguments(), *METHOD, *TOKENS, *sharded]
    server.succeed(whole, arguments, ranks=ranks)
    stop = {"name": "send_signal", "place": place, "call": call, "number": 15, "rank": 0}
    server.succeed(resumed, arguments, ranks=ranks, fault=stop)
    assert read_manifest(list_checkpoints(resumed)[-1]).state.step < 9
    server.succeed(resumed, [*arguments, *RESUME], ranks=ranks)
    assert_same(resumed, whole)
    files = read_manifest(list_checkpoints(whole)[-1]).files
    assert any(name.startswith("reference/") for name in files)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy.reference_steps", "5"], "expected at most policy.sync_interval_steps"),
        (["--policy.sync_first_step", "9"], "nothing would be selected"),
        (["--policy.keep_ratio", "0"], "policy.keep_ratio: expected a number"),
        (["--policy.reference", "somewhere"], "policy.reference: has no effect"),
        (["--weighting.update_on", "training"], "weighting.update_on: has no effect"),
    ],
)
def test_mistakes(
    server: Server, corpus: Corpus, tmp_path: Path, options: list[str], words: str
) -> None:
    job = server.run(tmp_path / "run", [*corpus.arguments(), *METHOD, *options])
    assert job.codes == [2] and words in job.text and "Traceback" not in job.text, job.text
