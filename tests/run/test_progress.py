"""What a run prints and shows on boards while it goes on."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dwm.run.terminal import Terminal
from megatron_dwm.weighting.schedule import Schedule, staged
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

STAGED = [
    *("--policy.name", "dwm", "--weighting.mode", "staged", "--weighting.encoder", "own"),
    *("--weighting.stages", "2", "--weighting.updates_per_stage", "3"),
    *("--training.log_interval_steps", "2", "--logging.weights_interval_steps", "1"),
]
STAMP = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "
STEP = (
    STAMP + r"step (\d+)/6 stage (\d) loss \d\.\d{4} lr \S+ grad norm \S+ effective sample size "
    r"[01]\.\d{3}, \S+ s a step, [\d,]+ tokens/s, \S+ TFLOP/s a process, [\d.]+ GiB, "
    r"\d:\d\d:\d\d left"
)


def _arguments(corpus: Corpus) -> list[str]:
    """A staged run with two held-out sets, of the same text."""
    [option, file] = corpus.held_out()
    sets = [option, file, "--evaluation.sets", f"more={file}", "--evaluation.interval_steps", "4"]
    return [*corpus.arguments(), *STAGED, *sets]


def test_lines_of_a_staged_run_and_of_its_resumption(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = _arguments(corpus)
    job = server.succeed(run_dir, [*arguments, *RESUME, "--training.steps", "6"])
    assert re.findall(STEP, job.text) == [("2", "1"), ("4", "2"), ("6", "2")]
    updates = re.findall(STAMP + r"update (\d)/3 stage 2 validation loss (\d\.\d+)", job.text)
    found = [line["val_loss"] for line in metrics(run_dir, "weighting")]
    assert updates == [(str(n), f"{found[n - 1]:.3f}") for n in (2, 3)]
    [line] = re.findall(r"checkpoint (step_0+6): ([\d.]+) MB in", job.text)
    files = (run_dir / "checkpoints" / line[0]).rglob("*")
    assert line[1] == f"{sum(f.stat().st_size for f in files if f.is_file()) / 1e6:.1f}"
    *_, last = metrics(run_dir, "evaluation")
    losses, names = last["domain_loss"], [n for n in last["domain_loss"] if "/" not in n]
    assert {f"more/{name}": losses[name] for name in names}.items() <= losses.items() and names
    assert f"files: {run_dir}" in job.text and "6 steps in 2 stages" in job.text
    assert "tensor 1 x context 1 x pipeline 1 x data 1" in job.text
    assert "resumed from" not in job.text
    assert f"no checkpoint in {run_dir}: starts from step 0" in job.text
    # Three more steps would have put the end of stage 1 elsewhere.
    longer = [*arguments, *RESUME, "--training.steps", "9"]
    refused = server.run(run_dir, longer)
    assert refused.codes == [2]
    assert "training.steps: with 6 steps, stages have ended at 3; with 9" in refused.text
    job = server.succeed(run_dir, [*longer, "--run.allow_changed", "training.steps"])
    assert "resumed from step_00000006: step 6, update 3" in job.text
    assert len(metrics(run_dir, "train")) == 9


def test_curves_of_domains_and_of_updates(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    board_on = ["--logging.tensorboard", "true"]
    server.succeed(run_dir, [*_arguments(corpus), *board_on, "--training.steps", "6"])
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    updates = board.Scalars("weighting/val_loss")
    assert [point.step for point in updates] == [1, 2, 3], "over updates, not steps"
    losses = [line["val_loss"] for line in metrics(run_dir, "weighting")]
    assert [point.value for point in updates] == pytest.approx(losses)
    assert [point.step for point in board.Scalars("train/tokens_per_second")] == [2, 4, 6]
    assert {"train/step_seconds", "train/flops_per_second", "train/memory_bytes"} <= set(
        board.Tags()["scalars"]
    )
    [file] = (run_dir / "weights").glob("*.parquet")
    rows = pq.read_table(file)
    rows = rows.filter(pc.equal(rows["step"], 6))
    means = rows.group_by("domain").aggregate([("weight", "mean")]).to_pylist()
    shown = {
        row["domain"]: board.Scalars(f"train/weight_by_domain/{row['domain']}")[-1] for row in means
    }
    assert {point.step for point in shown.values()} == {6}
    assert {name: point.value for name, point in shown.items()} == pytest.approx(
        {row["domain"]: row["weight_mean"] for row in means}, rel=1e-6
    )


@pytest.mark.parametrize("stages", [1, 3])
def test_a_bar_for_each_stage_and_phase(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("megatron_dwm.run.terminal._has_terminal", lambda: True)
    schedule = staged(6, stages=stages, updates=2, last=6)
    _drive(Terminal(shown=True, schedule=schedule, interval_steps=1), schedule)
    bars = re.findall(
        r"\r([^\r:]+(?:: weighting updates)?): +\d+%\|[^|]*\| (\d/\d)", screen.getvalue()
    )
    ends = {title: place for title, place in bars if place[0] == place[2]}
    if stages == 1:
        assert ends == {"steps": "6/6"}
    else:
        updates = {f"stage {n}/3: weighting updates": "2/2" for n in (2, 3)}
        assert ends == {f"stage {n}/3": "2/2" for n in (1, 2, 3)} | updates


def _drive(terminal: Terminal, schedule: Schedule) -> None:
    for step in range(schedule.steps):
        for number in range(schedule.updates_before(step)):
            terminal.update(number + 1, schedule.stage(step))
        terminal.step(step + 1, schedule.stage(step))
    terminal.close()
