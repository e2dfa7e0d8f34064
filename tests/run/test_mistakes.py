"""What users and machines do to a run between two starts: it is named, and nothing is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints
from tests.small_runs.command import metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server


@pytest.fixture
def copied(stopped: tuple[Path, list[str], Path], tmp_path: Path) -> tuple[Path, list[str]]:
    """(a run with one checkpoint, at step 2, which is no multiple of its interval; arguments)."""
    shutil.copytree(stopped[0], tmp_path / "run")
    return tmp_path / "run", stopped[1]


def _refused(server: Server, run_dir: Path, arguments: list[str], *words: str) -> None:
    before = {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "config.yaml")}
    job = server.run(run_dir, arguments)
    assert job.codes == [2] and "Traceback" not in job.text, job.text
    assert all(word in job.text for word in words), job.text
    assert before == {name: (run_dir / name).read_bytes() for name in before}


def test_a_run_that_lost_its_checkpoints_is_not_begun_again(
    server: Server, copied: tuple[Path, list[str]]
) -> None:
    """However often it is asked: what is recorded stays."""
    run_dir, arguments = copied
    [checkpoint] = list_checkpoints(run_dir)
    (checkpoint / "manifest.json").write_text("")
    _refused(server, run_dir, arguments, "no checkpoint", "manifest.json is damaged")
    _refused(server, run_dir, arguments, f"{checkpoint.name}.damaged")
    shutil.rmtree(run_dir / "checkpoints")
    _refused(server, run_dir, arguments, "there is none, though one was completed")
    (run_dir / ".had_checkpoint").unlink()  # as a run of an older version has it
    config = run_dir / "config.yaml"
    text = config.read_text()
    assert "checkpoint_interval_steps: 500" in text
    config.write_text(text.replace("interval_steps: 500", "interval_steps: 1"))
    lines = (run_dir / "metrics.jsonl").read_text() * 2
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write(lines.replace('"step": 1,', '"step": 3,').replace('"step": 2,', '"step": 4,'))
    _refused(server, run_dir, arguments, "though 4 steps are recorded")
    (run_dir / "checkpoints").symlink_to(run_dir / "elsewhere")
    _refused(server, run_dir, arguments, "is no directory")
    (run_dir / "checkpoints").unlink()
    config.write_text(text)
    job = server.succeed(run_dir, [*arguments, "--training.checkpoint_interval_steps", "1"])
    assert "has no checkpoint: its 4 steps are trained again" in job.text
    assert [line["step"] for line in metrics(run_dir, "train")] == [1, 2, 3]


def test_what_a_user_may_have_done_to_a_run_is_named(
    server: Server, copied: tuple[Path, list[str]]
) -> None:
    run_dir, arguments = copied
    [checkpoint] = list_checkpoints(run_dir)
    typo = ["--run.allow_changed", "run.sead", "--run.seed", "5"]
    _refused(server, run_dir, [*arguments, *typo], "no such key; the nearest is run.seed")
    both = ["--run.seed", "5", "--model.precision", "bf16"]
    _refused(server, run_dir, [*arguments, *both], "run.seed: ", "also changed: model.precision")
    wider = ["--weighting.hidden_size", "64", "--run.allow_changed", "weighting.hidden_size"]
    _refused(server, run_dir, [*arguments, *wider], "policy dwm does not fit")
    renamed = checkpoint.with_name("step_00000099")
    shutil.copytree(checkpoint, renamed)
    config = run_dir / "config.yaml"
    text = config.read_text()
    config.write_text("")
    _refused(server, run_dir, arguments, f"copy {renamed / 'config.yaml'} to {config}")
    config.write_text(text)
    other = ["--policy.name", "domain_mean", "--run.allow_changed", "policy.name"]
    job = server.succeed(run_dir, [*arguments, *other])
    assert f"it is {checkpoint.name} by its manifest" in job.text
    assert "has the state of policy dwm; domain_mean starts without one" in job.text
    assert [line["step"] for line in metrics(run_dir, "train")] == [1, 2, 3]


def test_a_start_that_ended_early_is_no_run(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    """Killed before its first file, or with the disk full at that file."""
    (tmp_path / "run" / "index_cache").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml.partial").write_text("")
    server.succeed(tmp_path / "run", [*corpus.arguments(), "--training.steps", "2"])
    assert not (tmp_path / "run" / "config.yaml.partial").exists()


def test_spikes_without_end_stop_the_run(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    mine = [*corpus.arguments(), "--training.spike_factor", "1.0001"]
    mine += ["--training.learning_rate", "1", "--training.clip_grad", "0"]
    job = server.run(tmp_path / "run", [*mine, "--training.max_skipped_steps", "2"])
    assert job.codes == [1] and "Traceback" not in job.text
    assert "3 batches in a row were spikes" in job.text
