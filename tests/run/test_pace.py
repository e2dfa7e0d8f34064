"""Speed and time left, against sums by hand."""

from __future__ import annotations

import pytest

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config, EvaluationConfig, TrainingConfig
from megatron_dwm.run.pace import Pace, Work
from megatron_dwm.weighting.costs import Costs
from megatron_dwm.weighting.schedule import Schedule, online, staged

STEPS = 100
COSTS = Costs(llm_step=10.0, update_passes=20.0)


def _pace(schedule: Schedule) -> Pace:
    config = Config(
        training=TrainingConfig(steps=STEPS, checkpoint_interval_steps=25),
        evaluation=EvaluationConfig(interval_steps=30),
    )
    return Pace(config, schedule, COSTS, tokens=1000, processes=4)


def test_speed_is_that_of_the_steps_since_the_last_call() -> None:
    pace = _pace(Schedule(steps=STEPS))
    pace.add(Work.STEP, 100.0, 1.0)
    pace.take_speed()
    pace.add(Work.STEP, 1.0, 40.0)
    pace.add(Work.EVALUATION, 50.0)
    pace.add(Work.UPDATE, 60.0)
    pace.add(Work.CHECKPOINT, 70.0)
    pace.add(Work.UPDATING_STEP, 3.0, 120.0)
    speed = pace.take_speed()
    assert (speed.step_s, speed.tokens_per_s, speed.flops_per_s) == (2.0, 500.0, 10.0)


def test_time_left_counts_every_kind_of_work() -> None:
    """At step 40 of 100: evaluations at 60, 90, 100; checkpoints at 50, 75, 100."""
    schedule = staged(STEPS, stages=4, updates=5, last=STEPS)
    pace = _pace(schedule)
    for kind, seconds in ((Work.STEP, 1.0), (Work.STEP, 2.0), (Work.UPDATE, 7.0)):
        pace.add(kind, seconds)
    pace.add(Work.EVALUATION, 10.0)
    pace.add(Work.CHECKPOINT, 0.5)
    left_s = pace.left_s(TrainState(step=40, updates=5))
    assert left_s == pytest.approx(60 * 1.5 + 10 * 7.0 + 3 * 10.0 + 3 * 0.5)
    assert pace.left_s(TrainState(step=STEPS, updates=15)) == 0.0


def test_work_that_was_not_seen_yet_takes_what_its_flops_suggest() -> None:
    fresh = _pace(online(STEPS, warmup=90, interval=4, last=STEPS, in_step=False))
    fresh.add(Work.STEP, 3.0)  # an update has twice the FLOPs
    assert fresh.left_s(TrainState(step=50)) == pytest.approx(50 * 3.0 + 3 * 6.0)
    inside = _pace(online(STEPS, warmup=90, interval=4, last=STEPS, in_step=True))
    inside.add(Work.STEP, 3.0)
    assert inside.left_s(TrainState(step=50)) == pytest.approx(47 * 3.0 + 3 * 9.0)
    assert fresh.left_s(TrainState(step=50)) > _pace(Schedule(steps=STEPS)).left_s(TrainState())


def test_only_recent_work_counts() -> None:
    pace = _pace(Schedule(steps=STEPS))
    pace.add(Work.STEP, 1000.0)
    for _ in range(50):
        pace.add(Work.STEP, 2.0)
    assert pace.left_s(TrainState(step=51)) == pytest.approx(49 * 2.0)
