"""When the weighting model learns: the run cut into stages, each begun by its updates.

Both modes of METHOD.md, section 1, are the same loop over stages: `staged` has a few long ones with
many updates each, `online` a block of a few steps with one update each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dwm.config import Config
from megatron_dwm.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps [first_step, end_step) with the weighting model frozen, after `num_updates` updates.

    number: counted from 1; in online mode all blocks belong to stage 1.
    """

    number: int
    first_step: int
    end_step: int
    num_updates: int


def plan_stages(config: Config) -> list[Stage]:
    """The stages of a run, in order; they cover its steps without a gap."""
    steps, weighting = config.training.steps, config.weighting
    if not config.learns:
        return [Stage(number=1, first_step=0, end_step=steps, num_updates=0)]
    if weighting.mode == "online":
        stages = _online(steps, weighting.warmup_steps, weighting.interval_steps)
    else:
        stages = _staged(steps, weighting.stages, weighting.updates_per_stage)
    last_step = weighting.freeze_after * steps
    return [
        stage if stage.first_step <= last_step else replace(stage, num_updates=0)
        for stage in stages
    ]


def first_weighed_step(config: Config, stages: list[Stage]) -> int:
    """The first step (from 0) whose weights a learned weighting model gives: the run's first one
    with a loaded model, `training.steps` if there is no update.
    """
    if config.weighting.load is not None:
        return 0
    learned = (stage.first_step for stage in stages if stage.num_updates)
    return next(learned, config.training.steps)


def stage_under_way(stages: list[Stage], state: TrainState) -> Stage:
    """The stage that the last step or, inside a weighting phase, the last update belongs to."""
    begun = [s for s in stages if s.first_step == state.step and state.stage_updates]
    return begun[0] if begun else next(s for s in stages if s.first_step < state.step <= s.end_step)


def _staged(steps: int, stages: int, updates: int) -> list[Stage]:
    """Stages of equal length; the first stays as it starts, since Adam's moments are empty."""
    borders = [steps * number // stages for number in range(stages + 1)]
    return [
        Stage(
            number=number + 1,
            first_step=borders[number],
            end_step=borders[number + 1],
            num_updates=updates if number else 0,
        )
        for number in range(stages)
    ]


def _online(steps: int, warmup: int, interval: int) -> list[Stage]:
    borders = [0, *range(max(warmup, 1), steps, interval), steps]
    return [
        Stage(number=1, first_step=first, end_step=end, num_updates=1 if first else 0)
        for first, end in zip(borders, borders[1:], strict=False)
        if end > first
    ]
