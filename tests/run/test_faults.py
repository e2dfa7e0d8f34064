"""Never lose a run: each fault is injected into real training, and the run goes on from it.

What was injected, survived and lost is counted in a table (`--fault-table FILE` writes it; `--long`
kills thirty times and more). A run that was disturbed has to end as the undisturbed one: the
same lines in metrics.jsonl, each step once, and the same bytes in its last checkpoint's tensors.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from megatron_dwm.files.run_names import STOPPED
from tests.small_runs.command import RESUME, metrics, scheduled_rate
from tests.small_runs.fixtures import CORPUS, Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same, last_step, saved_step, wait_for_step

INTERVAL = 4
STEPS = 16


@dataclass
class Table:
    """Faults by kind: injected, survived, and the most steps that one of them cost."""

    rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, fault: str, *, lost: int, allowed: int) -> None:
        """A fault has been injected and the run went on from it."""
        row = self.rows.setdefault(fault, [0, 0, 0, allowed])
        row[0] += 1
        row[1] += 1
        row[2] = max(row[2], lost)
        assert lost <= allowed, (fault, lost, allowed)

    def markdown(self) -> str:
        """The table as documents show it."""
        head = "| fault | injected | survived | most steps lost | allowed |\n| --- " + "| ---: " * 4
        lines = [f"| {name} | {' | '.join(map(str, row))} |" for name, row in self.rows.items()]
        return "\n".join([head + "|", *lines]) + "\n"


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    found = Table()
    yield found
    print(found.markdown())
    if file := request.config.getoption("--fault-table"):
        Path(file).write_text(found.markdown(), encoding="utf-8")


@pytest.fixture(scope="module")
def arguments(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A staged run: two stages with updates between, an evaluation, a checkpoint every 4 steps."""
    held_out = tmp_path_factory.mktemp("held_out") / "few.jsonl"
    lines = (CORPUS / "heldout.jsonl").read_text().splitlines(keepends=True)
    held_out.write_text("".join(lines[::8]))
    return [
        *corpus.arguments(),
        *("--policy.name", "dwm", "--weighting.mode", "staged", "--weighting.stages", "2"),
        *("--weighting.updates_per_stage", "3", "--weighting.encoder", "llm"),
        *("--weighting.group", "micro_batch", "--logging.weights_interval_steps", "2"),
        *("--training.steps", str(STEPS), "--evaluation.interval_steps", "6"),
        *("--evaluation.path", str(held_out)),
        *("--training.checkpoint_interval_steps", str(INTERVAL)),
    ]


@pytest.fixture(scope="module")
def undisturbed(server: Server, arguments: list[str], tmp_path_factory: object) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    server.succeed(run_dir, arguments, ranks=2)
    return run_dir


def test_kill_at_random_moments(
    server: Server,
    arguments: list[str],
    undisturbed: Path,
    table: Table,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """kill -9 of all ranks, again and again on the way; asynchronous saves in every other run."""
    wanted = 30 if request.config.getoption("--long") else 5
    chance = random.Random(5)
    kills, number = 0, 0
    while kills < wanted:
        run_dir = tmp_path / f"run{number}"
        background = number % 2 == 1
        number += 1
        mine = [*arguments, *RESUME, "--training.checkpoint_async", str(background).lower()]
        while saved_step(run_dir) + INTERVAL < STEPS and kills < wanted:
            target = saved_step(run_dir) + chance.randint(1, INTERVAL + 2)
            job = server.start(run_dir, mine, ranks=2)
            wait_for_step(job, run_dir, min(target, STEPS - 1))
            time.sleep(chance.uniform(0.0, 0.05))
            job.kill()
            kills += 1
            lost = last_step(run_dir) - saved_step(run_dir)
            name = "kill -9 at a random moment, 2 ranks" + (", async saves" * background)
            table.add(name, lost=lost, allowed=INTERVAL * (1 + background))
        server.succeed(run_dir, mine, ranks=2)
        assert_same(run_dir, undisturbed)


STOPS = [
    ("training", 7, signal.SIGTERM, 1),
    ("weighting", 2, signal.SIGUSR1, 0),
    ("evaluation", 1, signal.SIGUSR2, 1),
    ("checkpoint", 2, signal.SIGTERM, 0),
]


@pytest.mark.parametrize(("place", "call", "number", "rank"), STOPS, ids=str)
def test_signals_save_and_end_with_0(
    server: Server,
    arguments: list[str],
    undisturbed: Path,
    table: Table,
    tmp_path: Path,
    place: str,
    call: int,
    number: signal.Signals,
    rank: int,
) -> None:
    """One rank of two gets a signal; both save, within the step, and end with 0."""
    run_dir = tmp_path / "run"
    fault = {"name": "send_signal", "place": place, "call": call, "number": number, "rank": rank}
    job = server.succeed(run_dir, arguments, ranks=2, fault=fault)
    assert f"stopped at step {saved_step(run_dir)}" in job.text
    reached = {"training": 7, "weighting": 8, "evaluation": 6, "checkpoint": 8}[place]
    assert saved_step(run_dir) == last_step(run_dir) == reached
    table.add(f"{number.name} in {place}, one rank of 2", lost=0, allowed=0)
    server.succeed(run_dir, [*arguments, *RESUME], ranks=2)
    assert_same(run_dir, undisturbed)


def test_stop_and_save_files(
    server: Server, arguments: list[str], table: Table, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for name, newest in (("save", STEPS), ("stop", 3)):
        shutil.rmtree(run_dir, ignore_errors=True)
        fault = {"name": "touch", "place": "training", "call": 3, "file": str(run_dir / name)}
        server.succeed(run_dir, arguments, fault=fault)
        steps = [read_manifest(path).state.step for path in list_checkpoints(run_dir)]
        assert 3 in steps and steps[-1] == newest
        assert not (run_dir / name).exists()
        assert (run_dir / STOPPED).exists() == (name == "stop")
        table.add(f"file `{name}`", lost=0, allowed=0)
    server.succeed(run_dir, [*arguments, *RESUME])
    assert not (run_dir / STOPPED).exists(), "a start goes on"


def test_a_second_signal_stops_at_once(
    server: Server, arguments: list[str], tmp_path: Path
) -> None:
    """Launchers repeat the first one, so only what comes after two seconds is a second one."""
    fault = {"name": "two_signals", "place": "training", "call": 3}
    job = server.run(tmp_path / "a", arguments, fault={**fault, "apart_s": 0.1})
    assert job.codes == [0] and saved_step(tmp_path / "a") == 3
    job = server.run(tmp_path / "b", arguments, fault={**fault, "apart_s": 2.1})
    assert job.codes == [-signal.SIGTERM] and saved_step(tmp_path / "b") == 0


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "flipped bit in a shard": (_flip, "llm/__0_0.distcp", "has another checksum"),
    "deleted shard": (Path.unlink, "llm/__0_0.distcp", "is missing"),
    "file cut short": (lambda f: f.write_bytes(f.read_bytes()[:99]), "training.pt", "has 99 bytes"),
}


def test_damage_is_named_and_the_one_before_is_taken(
    server: Server, arguments: list[str], undisturbed: Path, table: Table, tmp_path: Path
) -> None:
    """Checkpoints are damaged one by one from the newest: each resume falls back further."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    for name, (damage, file, said) in DAMAGES.items():
        newest = list_checkpoints(run_dir)[-1]
        damage(newest / file)
        before = len(list_checkpoints(run_dir))
        # It goes on for no step, so that the next damage meets the checkpoint before.
        stop = {"name": "send_signal", "place": "training", "call": 1, "number": 15, "rank": 0}
        job = server.succeed(run_dir, [*arguments, *RESUME], ranks=2, fault=stop)
        assert f"{file} {said}" in job.text and newest.name in job.text, job.text
        assert (newest.with_name(f"{newest.name}.damaged")).is_dir()
        assert len(list_checkpoints(run_dir)) == before  # one set aside, one at the stop
        shutil.rmtree(list_checkpoints(run_dir)[-1])
        table.add(name, lost=INTERVAL, allowed=INTERVAL)
    server.succeed(run_dir, [*arguments, *RESUME], ranks=2)
    assert_same(run_dir, undisturbed)
    for path in list_checkpoints(run_dir):
        _flip(path / "manifest.json")
    job = server.run(run_dir, [*arguments, *RESUME])
    assert job.codes == [2] and "no checkpoint" in job.text and "manifest.json" in job.text
    assert "Traceback" not in job.text


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk_costs_a_checkpoint_not_the_run(
    server: Server,
    arguments: list[str],
    undisturbed: Path,
    table: Table,
    tmp_path: Path,
    small_disk: Path,
    background: str,
) -> None:
    run_dir = small_disk / "run"
    mine = [*arguments, "--training.checkpoint_async", background, "--data.cache_dir"]
    mine += [str(tmp_path / "cache"), "--training.checkpoint_interval_steps", "1"]
    job = server.run(run_dir, mine, ranks=2)
    assert job.codes == [1, 1] and "could not be written: No space left" in job.text, job.text
    assert "Traceback" not in job.text
    whole = list_checkpoints(run_dir)
    assert 0 < len(whole) < STEPS and not list(run_dir.glob("checkpoints/*.partial"))
    for path in whole[:-1]:
        shutil.rmtree(path)
    job = server.succeed(run_dir, [*mine, "--training.keep_last", "1", *RESUME], ranks=2)
    # Of a line that the disk took half of, the half is set aside; nothing else is.
    assert "is damaged" not in job.text and saved_step(run_dir) == STEPS
    [*aside] = run_dir.rglob("*.damaged*")
    assert aside in ([], [run_dir / "metrics.jsonl.damaged"])
    assert all(path.read_bytes().count(b"\n") == 1 for path in aside)
    assert len(list_checkpoints(run_dir)) == 1
    taken, expected = metrics(run_dir, "train"), metrics(undisturbed, "train")
    assert [line["step"] for line in taken] == list(range(1, STEPS + 1))
    losses = [[line["loss"] for line in lines] for lines in (taken, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # two ranks, against one
    table.add("disk full", lost=0, allowed=0)


def test_nan_batches_are_skipped_and_many_stop_the_run(
    server: Server, arguments: list[str], table: Table, tmp_path: Path
) -> None:
    fault = {"name": "nan_batches", "rank": 1}
    server.succeed(tmp_path / "a", arguments, ranks=2, fault={**fault, "steps": [3, 4, 10]})
    skipped = metrics(tmp_path / "a", "skipped")
    assert [line["step"] for line in skipped] == [3, 4, 10]
    assert (skipped[0]["first_sample"], skipped[0]["last_sample"]) == (16, 23)
    taken = metrics(tmp_path / "a", "train")
    assert [line["step"] for line in taken] == [s for s in range(1, 17) if s not in (3, 4, 10)]
    # At step 4 the run was in trouble: the checkpoint came when it was over.
    steps = [read_manifest(path).state.step for path in list_checkpoints(tmp_path / "a")]
    assert steps == [5, 8, 12, 16]
    assert read_manifest(list_checkpoints(tmp_path / "a")[-1]).state.skipped == 3
    table.add("NaN batch", lost=0, allowed=0)
    many = {"name": "nan_batches", "rank": 0, "steps": list(range(6, 13))}
    job = server.run(tmp_path / "b", [*arguments, "--training.max_skipped_steps", "3"], fault=many)
    assert job.codes == [1] and "samples 64 to 71" in job.text and "4 steps in a row" in job.text
    assert saved_step(tmp_path / "b") == 4


def test_a_spike_takes_the_run_back_and_passes_over_its_batch(
    server: Server, corpus: Corpus, table: Table, tmp_path: Path
) -> None:
    mine = [*corpus.arguments(), "--training.checkpoint_interval_steps", "4"]
    mine += ["--training.learning_rate", "0.02", "--policy.name", "dwm"]
    mine += ["--logging.weights_interval_steps", "1"]
    guarded = [*mine, "--training.spike_factor", "1.1"]
    fault = {"name": "spike_batches", "steps": [18]}
    job = server.succeed(tmp_path / "run", guarded, fault=fault)
    assert "step 18: loss" in job.text and "back to step 16" in job.text
    [skipped] = metrics(tmp_path / "run", "skipped")
    assert skipped["step"] == 18 and skipped["first_sample"] == 17 * 8
    taken = metrics(tmp_path / "run", "train")
    assert [line["step"] for line in taken] == [step for step in range(1, 21) if step != 18]
    for line in taken:
        rate = scheduled_rate(line["step"], steps=20, warm_up=1, peak=0.02)
        assert line["lr"] == pytest.approx(rate, rel=1e-6)
    # What it goes on from is the checkpoint, in every part: it is a run that skipped this batch.
    skip = {"name": "nan_batches", "steps": [18], "rank": 0}
    server.succeed(tmp_path / "skips", mine, fault=skip)
    for phase in ("train", "weighting"):
        ours, theirs = (_lines(tmp_path / name, phase) for name in ("run", "skips"))
        assert ours == theirs
    rows = [row for file in tmp_path.glob("run/weights/*.parquet") for row in _weighed(file)]
    assert len(rows) == len(set(rows)) and {step for step, *_ in rows} >= {16, 17, 19}
    table.add("spike of the loss (guard on)", lost=1, allowed=INTERVAL)


def _lines(run_dir: Path, phase: str) -> list[dict[str, Any]]:
    work = {"seconds", "flops", "flops_weighting", "flops_updates"}
    return [{k: v for k, v in line.items() if k not in work} for line in metrics(run_dir, phase)]


def _weighed(file: Path) -> list[tuple[int, str, int]]:
    rows = pq.read_table(file).to_pylist()
    return [(row["step"], row["source"], row["sample_id"]) for row in rows]


def test_a_held_out_loss_that_is_no_number_ends_the_run(
    server: Server, arguments: list[str], tmp_path: Path
) -> None:
    job = server.run(tmp_path / "run", arguments, fault={"name": "nan_evaluation", "call": 2})
    assert job.codes == [1] and "step 12: held-out loss" in job.text
    assert saved_step(tmp_path / "run") == 8, "the message says to go on from there"
    assert [line["step"] for line in metrics(tmp_path / "run", "evaluation")] == [6]
    assert last_step(tmp_path / "run") == 12


@pytest.mark.parametrize("value", [-0.5, float("inf"), 3.0], ids=str)
def test_weights_that_are_none_stop_the_run(
    server: Server, corpus: Corpus, tmp_path: Path, value: float
) -> None:
    fault = {"name": "wrong_weights", "step": 3, "value": value}
    job = server.run(tmp_path / "run", corpus.arguments(), fault=fault)
    assert job.codes == [1] and "finite, non-negative and of mean 1" in job.text
    assert last_step(tmp_path / "run") == 2


def test_the_second_of_two_processes_refuses(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first = server.start(run_dir, corpus.arguments(), fault={"name": "slow_steps", "seconds": 0.5})
    wait_for_step(first, run_dir, 1)
    second = server.run(run_dir, [*corpus.arguments(), *RESUME])
    assert second.codes == [2] and "another process is training" in second.text
    assert "Traceback" not in second.text
    first.kill()
    server.succeed(run_dir, [*corpus.arguments(), *RESUME, "--training.steps", "2"])
