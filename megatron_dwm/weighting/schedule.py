"""When a method updates: pure functions of the step, so a checkpoint need not save anything.

`staged` makes many updates at each stage boundary, `online` one every few steps (METHOD.md, section
1). Steps are numbered from 0: an update before step k comes after the LLM has taken k steps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from megatron_dwm.config import Config


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The updates and the stages of a run of `steps` steps.

    update_steps: the steps before which updates are made, ascending.
    updates_each: updates before each of them, with the LLM frozen.
    borders: the first step of every stage, ascending, beginning with 0.
    in_step: the update comes inside the preceding step, from that step's own batch.
    fresh: an update reads a training batch of its own.
    ahead: the direction of an update in a step comes before the step's gradient (bilevel/ahead.py).
    """

    steps: int
    update_steps: Sequence[int] = ()
    updates_each: int = 1
    borders: Sequence[int] = (0,)
    in_step: bool = False
    fresh: bool = False
    ahead: bool = False

    def updates_before(self, step: int) -> int:
        """Returns the number of updates that are due before step `step`."""
        last = bisect_right(self.update_steps, step) - 1
        due = last >= 0 and self.update_steps[last] == step
        return self.updates_each if due else 0

    def updates_left(self, step: int, inside: int) -> int:
        """Returns the number of updates to come after `step` steps.

        inside: updates already made after the last of these steps.
        """
        later = len(self.update_steps) - bisect_right(self.update_steps, step)
        now = 0 if self.in_step else max(self.updates_before(step) - inside, 0)
        return later * self.updates_each + now

    def stage(self, step: int) -> int:
        """Returns the number, from 1, of the stage of step `step`."""
        return bisect_right(self.borders, min(step, self.steps - 1))

    def steps_of(self, stage: int) -> range:
        """Returns the steps, from 0, of a stage."""
        ends = (*self.borders[1:], self.steps)
        return range(self.borders[stage - 1], ends[stage - 1])

    def ends_stage(self, step: int) -> bool:
        """True if a stage ends after `step` steps."""
        return step == self.steps or self.stage(step) != self.stage(step - 1)

    @property
    def num_updates(self) -> int:
        """Number of updates in the whole run."""
        return self.updates_each * len(self.update_steps)

    @property
    def first_update(self) -> int:
        """The step before which the first update is made; `steps` if there is none."""
        return self.update_steps[0] if self.update_steps else self.steps


def schedule_of(config: Config) -> Schedule:
    """Returns the schedule of a method that learns from alignments, by `weighting.mode`."""
    weighting = config.weighting
    # 0.7 x 90 is a little below 63 in floating point.
    last = round(weighting.freeze_after * config.training.steps, 6)
    if weighting.mode == "online":
        return online(
            config.training.steps,
            warmup=weighting.warmup_steps,
            interval=weighting.interval_steps,
            last=last,
            in_step=config.update_on != "fresh",
            ahead=config.update_on == "ahead",
        )
    return staged(
        config.training.steps,
        stages=weighting.stages,
        updates=weighting.updates_per_stage,
        last=last,
    )


def staged(steps: int, *, stages: int, updates: int, last: float) -> Schedule:
    """Returns stages of equal length; each but the first begins with `updates` updates.

    In the first one Adam's moments are still empty. last: the step after which no update is made.

    >>> staged(1000, stages=5, updates=20, last=1000).update_steps
    (200, 400, 600, 800)
    """
    borders = [steps * number // stages for number in range(stages)]
    return Schedule(
        steps=steps,
        update_steps=tuple(takewhile(lambda step: step <= last, borders[1:])),
        updates_each=updates,
        borders=tuple(borders),
        fresh=True,
    )


def online(
    steps: int, *, warmup: int, interval: int, last: float, in_step: bool, ahead: bool = False
) -> Schedule:
    """Returns one update after `warmup` steps and then every `interval` steps, in one stage.

    >>> list(online(100, warmup=50, interval=20, last=100, in_step=True).update_steps)
    [50, 70, 90]
    """
    end = min(steps, int(last) + 1)
    return Schedule(
        steps=steps,
        update_steps=range(max(warmup, 1), end, interval),
        in_step=in_step,
        fresh=not in_step,
        ahead=ahead,
    )
