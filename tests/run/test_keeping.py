"""What is taken away from a run while it trains or between two starts is not lost silently."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.run.foreign_lines import FOREIGN
from tests.small_runs.command import RESUME, metrics, without_time
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import last_step, wait_for_step

NOTES = (".had_checkpoint", ".no_checkpoint_yet")


@pytest.fixture(scope="module")
def undisturbed(
    server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """(a finished run of 6 steps with checkpoints at 2, 4 and 6; its arguments)."""
    mine = [*corpus.arguments(), "--training.steps", "6", "--logging.weights_interval_steps", "1"]
    mine += ["--training.checkpoint_interval_steps", "2"]
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    server.succeed(run_dir, mine)
    return run_dir, mine


def _errors(text: str) -> list[str]:
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("board", ["false", "true"])
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_run_directory_that_is_removed_ends_the_run(
    server: Server, corpus: Corpus, tmp_path: Path, ranks: int, board: str, background: str
) -> None:
    run_dir = tmp_path / "run"
    mine = [*corpus.arguments(), "--logging.tensorboard", board]
    mine += ["--training.checkpoint_interval_steps", "2", "--training.checkpoint_async", background]
    fault = {"name": "remove", "place": "training", "call": 4, "paths": [str(run_dir)]}
    job = server.run(run_dir, mine, ranks=ranks, fault=fault)
    assert job.codes[0] == 1, job.text
    # The others wait for the main rank to speak; the launcher ends them when it has left.
    assert all(code in (1, -15, -9) for code in job.codes), job.codes
    [line] = _errors(job.text)
    assert f"run.dir: {run_dir} was removed, moved or replaced" in line
    assert not [s for s in job.text.splitlines() if "warning" in s and "no effect" not in s]
    assert not run_dir.exists(), "parts of it would look like a run"


def test_every_rank_ends_by_itself_when_the_directory_is_gone(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """Another directory in its place is not the run's, even if a job holds it by now."""
    run_dir = tmp_path / "run"
    slow = {"name": "slow_steps", "seconds": 0.3}
    job = server.start(run_dir, corpus.arguments(), fault=slow)
    wait_for_step(job, run_dir, 1)
    run_dir.rename(tmp_path / "moved")
    run_dir.mkdir()
    assert job.wait() == [1]
    assert len(_errors(job.text)) == 1 and list(run_dir.iterdir()) == []


def test_records_that_are_removed_are_made_again(
    server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    expected, arguments = undisturbed
    run_dir = tmp_path / "run"
    gone = [str(run_dir / name) for name in ("metrics.jsonl", "config.yaml", ".lock")]
    job = server.succeed(
        run_dir,
        arguments,
        fault={"name": "remove", "place": "training", "call": 3, "paths": gone},
    )
    assert f"warning: {run_dir / 'metrics.jsonl'} was removed: it is written again" in job.text
    assert f"warning: {run_dir / 'config.yaml'} was removed: it is written again" in job.text
    assert without_time(run_dir) == without_time(expected)
    ours, theirs = ((d / "config.yaml").read_text() for d in (run_dir, expected))
    assert ours == theirs.replace(str(expected), str(run_dir))
    assert (run_dir / ".lock").exists()
    server.succeed(run_dir, [*arguments, *RESUME, "--training.steps", "7"])


def test_another_file_in_the_place_of_the_records_is_set_aside(
    server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    expected, arguments = undisturbed
    run_dir = tmp_path / "run"
    fault = {"name": "replace_file", "place": "training", "call": 3, "text": "mine\n"}
    job = server.succeed(
        run_dir, arguments, fault={**fault, "path": str(run_dir / "metrics.jsonl")}
    )
    assert "the file that replaced it is now metrics.jsonl.replaced" in job.text
    assert (run_dir / "metrics.jsonl.replaced").read_text() == "mine\n"
    assert without_time(run_dir) == without_time(expected)


@pytest.mark.parametrize("how", ["removed", "full"])
def test_curves_that_cannot_be_written_cost_no_run(
    server: Server, undisturbed: tuple[Path, list[str]], small_disk: Path, how: str
) -> None:
    """TensorBoard reads what was written up to then."""
    run_dir = small_disk / "run"
    mine = [*undisturbed[1], "--logging.tensorboard", "true", "--training.steps", "20"]
    mine += ["--training.checkpoint_interval_steps", "0", "--logging.weights_interval_steps", "0"]
    if how == "removed":
        what = {"name": "remove", "paths": [str(run_dir / "tensorboard")]}
    else:
        what = {"name": "fill", "folder": str(small_disk)}
    job = server.run(run_dir, mine, fault={**what, "place": "training", "call": 3})
    assert "Traceback" not in job.text, job.text
    # Without room the state at the end cannot be saved, which is another matter.
    assert job.codes == [0 if how == "removed" else 1]
    assert last_step(run_dir) >= 3
    if how == "full":
        assert "TensorBoard has no curves from here on" in job.text


def test_tensorboard_reads_what_metrics_say(
    server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    server.succeed(run_dir, [*undisturbed[1], "--logging.tensorboard", "true"])
    server.succeed(
        run_dir,
        [*undisturbed[1], "--logging.tensorboard", "true", *RESUME, "--training.steps", "8"],
    )
    read = EventAccumulator(str(run_dir / "tensorboard"))
    read.Reload()
    for name in ("loss", "grad_norm", "weight_std"):
        curve = [(event.step, event.value) for event in read.Scalars(f"train/{name}")]
        lines = [(line["step"], line[name]) for line in metrics(run_dir, "train")]
        assert curve == [(step, pytest.approx(value, rel=1e-6)) for step, value in lines]


def test_checkpoints_that_are_gone_are_asked_for(
    server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Whatever its steps say; and by its steps, if an older version began the run."""
    run_dir, arguments = tmp_path / "run", [*undisturbed[1], *RESUME]
    shutil.copytree(undisturbed[0], run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    before = (run_dir / "metrics.jsonl").read_bytes()
    lines = before.splitlines(keepends=True)
    for text, noted in ((before, True), (before, False), (b"".join(lines[:1]), True)):
        (run_dir / "metrics.jsonl").write_bytes(text)
        if not noted:
            (run_dir / NOTES[0]).unlink()
        job = server.run(run_dir, arguments)
        [line] = _errors(job.text)
        why = "one was completed" if noted else "6 steps are recorded"
        assert job.codes == [2] and f"there is none, though {why}; bring back a copy" in line
        assert (run_dir / "metrics.jsonl").read_bytes() == text
        (run_dir / NOTES[0]).touch()


def test_a_disk_that_was_full_from_the_start_asks_for_nothing(
    server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path, small_disk: Path
) -> None:
    (small_disk / "filler").write_bytes(bytes(8_500_000))
    run_dir = small_disk / "run"
    mine = [*undisturbed[1], "--data.cache_dir", str(tmp_path / "cache")]
    job = server.run(run_dir, mine)
    assert job.codes == [1] and "could not be written: No space left" in job.text, job.text
    assert [line["step"] for line in metrics(run_dir, "train")] == list(range(1, 7))
    (small_disk / "filler").unlink()
    job = server.succeed(run_dir, [*mine, *RESUME])
    assert "has no checkpoint and never had one: its 6 steps are trained again" in job.text
    assert without_time(run_dir) == without_time(undisturbed[0])


def test_weights_that_cannot_be_read_are_set_aside_and_named(
    server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[0], run_dir)
    first, second, *_ = sorted((run_dir / "weights").glob("*.parquet"))
    first.write_bytes(b"not what a run writes")
    second.write_bytes(second.read_bytes()[:-7])
    own = run_dir / "weights" / "steps_of_mine.parquet"
    own.write_bytes(b"mine")
    cut = second.read_bytes()
    job = server.succeed(run_dir, [*undisturbed[1], *RESUME, "--training.steps", "7"])
    assert first.with_name(f"{first.name}.damaged").read_bytes() == b"not what a run writes"
    assert second.with_name(f"{second.name}.damaged").read_bytes() == cut
    for file in (first, second):
        [line] = [text for text in job.text.splitlines() if str(file) in text]
        assert line.startswith(f"warning: {file} is damaged") and f"{file.name}.damaged" in line
    assert own.read_bytes() == b"mine"


def test_foreign_lines_are_set_aside_and_named(
    server: Server, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """All at once: the others stay as they were, to the byte."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[0], run_dir)
    file = run_dir / "metrics.jsonl"
    before = file.read_bytes()
    first, rest = before.split(b"\n", 1)
    file.write_bytes(b"\n".join([first, *FOREIGN.values(), rest]) + b'{"step": 6, "pha')
    job = server.succeed(run_dir, [*undisturbed[1], *RESUME, "--training.steps", "7"])
    damaged = (run_dir / "metrics.jsonl.damaged").read_bytes()
    assert damaged == b"\n".join([*FOREIGN.values(), b'{"step": 6, "pha', b""])
    [line] = [text for text in job.text.splitlines() if "metrics.jsonl" in text]
    assert line.startswith(f"warning: {file} lines 2, 3, 4, 5, 6 and {len(FOREIGN) - 4} more: ")
    assert line.endswith("set aside in metrics.jsonl.damaged") and "Traceback" not in job.text
    assert file.read_bytes().startswith(before)
    assert [line["step"] for line in metrics(run_dir, "train")] == list(range(1, 8))


def test_checkpoints_at_multiples_are_kept(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    mine = [*corpus.arguments(), "--training.checkpoint_interval_steps", "2"]
    mine += ["--training.keep_last", "1", "--training.keep_every", "4"]
    for steps, kept in (("6", [4, 6]), ("10", [4, 8, 10])):
        server.succeed(tmp_path / "run", [*mine, "--training.steps", steps, *RESUME])
        found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert found == [f"step_{step:08d}" for step in kept]
