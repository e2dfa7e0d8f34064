"""Lines of metrics.jsonl that are written several at a time are the same lines."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config
from megatron_dwm.run.files import RunFiles
from megatron_dwm.run.health import Health
from megatron_dwm.run.records import STATISTICS, weight_statistics
from megatron_dwm.run.step_lines import StepLines
from megatron_dwm.weighting.dwm import Dwm
from tests.small_runs.command import RESUME, metrics, without_time
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server


def test_statistics_by_hand() -> None:
    weights = torch.tensor([0.5, 0.5, 1.0, 2.0])
    found = dict(zip(STATISTICS, weight_statistics(weights).tolist(), strict=True))
    assert found["weight_mean"] == 1.0 and found["weight_min"] == 0.5 and found["weight_max"] == 2.0
    assert abs(found["weight_std"] - (1.5 / 4) ** 0.5) < 1e-6  # squares 0.25, 0.25, 0, 1
    assert abs(found["weight_effective_sample_size"] - 16 / (4 * 5.5)) < 1e-6
    shares = torch.tensor([1 / 8, 1 / 8, 1 / 4, 1 / 2])
    entropy = -(shares * shares.log()).sum() / torch.tensor(4.0).log()
    assert abs(found["weight_entropy"] - float(entropy)) < 1e-6


def test_statistics_of_documents_by_hand() -> None:
    """Sizes 3, 1 and 2; the last unit is padding, which nothing counts."""
    sizes = torch.tensor([3.0, 1.0, 2.0, 0.0])
    found = weight_statistics(torch.tensor([0.5, 1.5, 1.5, 100.0]), sizes).tolist()
    named = dict(zip(STATISTICS, found, strict=True))
    assert named["weight_mean"] == 1.0  # 1.5 + 1.5 + 3 over 6
    assert named["weight_min"] == 0.5 and named["weight_max"] == 1.5
    assert abs(named["weight_std"] - 0.5) < 1e-6
    assert abs(named["weight_effective_sample_size"] - 36 / (6 * 7.5)) < 1e-6


def test_lines_wait_until_they_are_written(tmp_path: Path) -> None:
    said: list[str] = []
    files = RunFiles(tmp_path, Config(), said.append)
    health = Health(
        min_effective_sample_size=0.3,
        min_signal_to_noise=0.0,
        gentler=Dwm.gentler,
        warn=said.append,
    )
    lines = StepLines(health, files)
    equal = weight_statistics(torch.ones(4))
    collapsed = weight_statistics(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    for step in (1, 2):
        warm = {"weight_temperature": torch.tensor(1.5)}
        lines.add({"step": step, "phase": "train"}, equal, {"tokens": step}, more=warm)
    assert not (tmp_path / "metrics.jsonl").read_text()
    lines.write()
    lines.add({"step": 3, "phase": "train"}, collapsed, {"tokens": 3}, more={})
    lines.drop()  # after a way back to a checkpoint
    lines.add({"step": 3, "phase": "train"}, collapsed, {"tokens": 3}, more={})
    lines.write()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [1, 2, 3]
    assert list(written[0]) == ["step", "phase", *STATISTICS, "weight_temperature", "tokens"]
    assert list(written[2]) == ["step", "phase", *STATISTICS, "tokens"]
    assert written[0]["weight_temperature"] == 1.5
    assert written[0]["weight_std"] == 0.0 and written[2]["weight_max"] == 4.0
    assert any("the weights have collapsed" in text for text in said)
    files.metrics.close()


def test_a_missing_configuration_is_written_again(tmp_path: Path) -> None:
    said: list[str] = []
    files = RunFiles(tmp_path, Config(), said.append)
    files.write({"step": 1, "phase": "train"})
    assert (tmp_path / "config.yaml").is_file() and "config.yaml was removed" in said[0]
    files.metrics.reopen_at(TrainState())
    assert not (tmp_path / "metrics.jsonl").read_text()
    files.metrics.close()


def test_a_run_with_an_interval_writes_the_same_lines(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """Stopped and killed on the way; seven steps do not divide what is between its updates."""
    arguments = [*corpus.arguments(), "--policy.name", "dwm", "--training.steps", "12"]
    server.succeed(tmp_path / "each", arguments)
    run_dir, seven = tmp_path / "seven", [*arguments, "--logging.metrics_interval_steps", "7"]
    stop = {"name": "send_signal", "place": "training", "call": 3, "number": 15, "rank": 0}
    server.succeed(run_dir, seven, fault=stop)
    killed = server.run(run_dir, [*seven, *RESUME], fault={**stop, "number": 9})
    assert killed.codes == [-9], killed.text
    server.succeed(run_dir, [*seven, *RESUME])
    assert without_time(run_dir) == without_time(tmp_path / "each")


def test_a_run_that_fails_leaves_the_lines_of_its_steps(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    wrong = {"name": "wrong_weights", "step": 5, "value": -1.0}
    arguments = [*corpus.arguments(), "--policy.name", "uniform", "--training.steps", "9"]
    arguments += ["--logging.metrics_interval_steps", "7"]
    job = server.run(tmp_path / "run", arguments, fault=wrong)
    assert job.codes == [1] and "must be finite, non-negative and of mean 1" in job.text
    assert [line["step"] for line in metrics(tmp_path / "run", "train")] == [1, 2, 3, 4]
