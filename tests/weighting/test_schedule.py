"""When updates are made, against a count step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dwm.config import Config, TrainingConfig, WeightingConfig
from megatron_dwm.weighting.schedule import Schedule, online, schedule_of, staged
from megatron_dwm.weighting.similarity import Similarity


@pytest.mark.parametrize(("steps", "stages"), [(1, 1), (7, 3), (7, 5), (100, 3), (100, 1)])
@pytest.mark.parametrize("last", [0.3, 1.0])
def test_staged_updates_begin_every_stage_but_the_first(
    steps: int, stages: int, last: float
) -> None:
    schedule = staged(steps, stages=stages, updates=4, last=last * steps)
    firsts = [steps * number // stages for number in range(stages)]
    for step in range(steps):
        begins = step in firsts[1:] and step <= last * steps
        assert schedule.updates_before(step) == (4 if begins else 0)
        assert schedule.stage(step) == sum(first <= step for first in firsts)
    assert schedule.num_updates == sum(map(schedule.updates_before, range(steps)))
    for step in range(steps):
        later = sum(map(schedule.updates_before, range(step + 1, steps)))
        now = schedule.updates_before(step)
        assert schedule.updates_left(step, 0) == later + now
        assert schedule.updates_left(step, 4) == later
    assert [schedule.steps_of(stage + 1) for stage in range(stages)] == [
        range(first, end) for first, end in zip(firsts, [*firsts[1:], steps], strict=True)
    ]
    ends = [step for step in range(1, steps + 1) if schedule.ends_stage(step)]
    assert ends == [*firsts[1:], steps]


@pytest.mark.parametrize("warmup", [0, 1, 5, 30])
@pytest.mark.parametrize("last", [0.4, 1.0])
def test_online_updates_come_every_interval_after_the_warm_up(warmup: int, last: float) -> None:
    steps, interval = 25, 4
    schedule = online(steps, warmup=warmup, interval=interval, last=last * steps, in_step=False)
    due = [
        step
        for step in range(1, steps)
        if step >= warmup and (step - max(warmup, 1)) % interval == 0 and step <= last * steps
    ]
    assert [step for step in range(steps) if schedule.updates_before(step)] == due
    assert schedule.num_updates == len(due) and schedule.updates_each == 1
    assert schedule.first_update == (due[0] if due else steps)
    assert {schedule.stage(step) for step in range(steps + 1)} == {1}
    inside = online(steps, warmup=warmup, interval=interval, last=last * steps, in_step=True)
    for step in range(steps):
        assert schedule.updates_left(step, 0) == sum(number >= step for number in due)
        assert inside.updates_left(step, 0) == sum(number > step for number in due)
    assert [step for step in range(1, steps + 1) if schedule.ends_stage(step)] == [steps]


def test_plain_training_has_no_updates_and_one_stage() -> None:
    schedule = Schedule(steps=10)
    assert schedule.num_updates == 0 and schedule.first_update == 10
    assert not any(schedule.updates_before(step) for step in range(11))
    assert [step for step in range(1, 11) if schedule.ends_stage(step)] == [10]


def test_a_billion_steps_cost_nothing() -> None:
    schedule = online(10**9, warmup=50, interval=10, last=1e9, in_step=True)
    assert schedule.num_updates == 99_999_995
    assert schedule.updates_before(999_999_990) == 1 and schedule.updates_before(999_999_991) == 0


def test_a_fraction_of_the_steps_is_not_cut_by_rounding() -> None:
    """0.7 x 90 is 62.99999999999999 in floating point, and a stage begins at step 63."""
    weighting = WeightingConfig(mode="staged", stages=10, freeze_after=0.7)
    config = Config(training=TrainingConfig(steps=90), weighting=weighting)
    assert 63 in schedule_of(config).update_steps
    weighting = replace(weighting, mode="online", warmup_steps=3, interval_steps=10)
    assert 63 in Similarity.schedule(replace(config, weighting=weighting)).update_steps
