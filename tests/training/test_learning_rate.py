"""The learning rate of every step, against the schedule written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.config import TrainingConfig
from megatron_dwm.training.optimizer import learning_rate_of
from tests.small_runs.command import RESUME, metrics, scheduled_rate
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

PEAK = 3e-3


def _rates(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["lr"] for line in metrics(run_dir, "train")}


def _expected(steps: int, warm_up: int, least: float = 0.1) -> dict[int, float]:
    rates = (
        scheduled_rate(step, steps=steps, warm_up=warm_up, peak=PEAK, least=least)
        for step in range(1, steps + 1)
    )
    return {step: pytest.approx(rate, rel=1e-6) for step, rate in enumerate(rates, 1)}


def test_every_step_has_the_rate_of_its_number(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """From the first rung to the end of the cosine, through a stop, a resume and a skipped step."""
    run_dir = tmp_path / "run"
    arguments = [*corpus.arguments(), "--training.steps", "12", "--training.warmup_fraction", "0.4"]
    stop = {"name": "send_signal", "place": "training", "call": 3, "number": 15, "rank": 0}
    server.succeed(run_dir, arguments, fault=stop)
    assert sorted(_rates(run_dir)) == [1, 2, 3], "stopped inside the warm-up"
    skip = {"name": "nan_batches", "steps": [9], "rank": 0}
    server.succeed(run_dir, [*arguments, *RESUME], fault=skip)
    expected = _expected(steps=12, warm_up=4)
    del expected[9]
    found = _rates(run_dir)
    assert found == expected
    assert (found[1], found[4], found[12]) == pytest.approx((PEAK / 4, PEAK, PEAK / 10))


def test_without_a_warm_up_the_cosine_begins_at_once(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """It ends at another fraction of the peak, which a resumed run may change."""
    arguments = [*corpus.arguments(), "--training.steps", "4", "--training.warmup_fraction", "0"]
    least = "--training.min_learning_rate_fraction"
    stop = {"name": "send_signal", "place": "training", "call": 2, "number": 15, "rank": 0}
    server.succeed(tmp_path / "run", [*arguments, least, "0.3"], fault=stop)
    resumed = server.succeed(tmp_path / "run", [*arguments, least, "1", *RESUME])
    assert "warning: the learning rate of step 3 is 3.00e-03; with the settings" in (resumed.text)
    before = _expected(steps=4, warm_up=0, least=0.3)
    assert _rates(tmp_path / "run") == {1: before[1], 2: before[2], 3: PEAK, 4: PEAK}


@pytest.mark.parametrize(("steps", "warm_up"), [(12, 0.4), (4, 0.0), (7, 0.2), (5, 1.0)])
def test_the_rate_that_a_resume_foretells_is_the_formulas(steps: int, warm_up: float) -> None:
    config = TrainingConfig(
        steps=steps,
        warmup_fraction=warm_up,
        learning_rate=PEAK,
        min_learning_rate_fraction=0.1,
    )
    found = {step: learning_rate_of(config, step) for step in range(1, steps + 1)}
    assert found == _expected(steps, int(steps * warm_up))
