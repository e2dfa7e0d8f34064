"""Where the time of a run goes, and how long the rest of it takes.

Times of each kind of work are averaged over the last pieces of work, because a mean since the start
holds the slow first steps, and changes slowly where the speed changes at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config
from megatron_dwm.weighting.costs import Costs
from megatron_dwm.weighting.schedule import Schedule

_RECENT = 50


class Work(Enum):
    """A kind of work whose time is averaged by itself."""

    STEP = "step"
    UPDATING_STEP = "step with an update inside"
    UPDATE = "update"
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint"


STEPS = (Work.STEP, Work.UPDATING_STEP)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Means over the steps since the last line about steps, updates inside them included.

    flops_per_s: of one process.
    """

    step_s: float
    tokens_per_s: float
    flops_per_s: float


class Pace:
    """Averages the time of every kind of work, and estimates the time that is left.

    tokens: trained on in a step; processes: that share the FLOPs.
    """

    def __init__(
        self, config: Config, schedule: Schedule, costs: Costs, *, tokens: int, processes: int
    ) -> None:
        self._config, self._schedule = config, schedule
        self._tokens, self._processes = tokens, processes
        self._flops = {
            Work.STEP: costs.llm_step,
            Work.UPDATING_STEP: costs.llm_step + costs.update,
            Work.UPDATE: costs.update,
        }
        self._recent_s: dict[Work, deque[float]] = {kind: deque(maxlen=_RECENT) for kind in Work}
        self._steps, self._steps_s, self._steps_flops = 0, 0.0, 0.0

    def add(self, kind: Work, seconds: float, flops: float = 0.0) -> None:
        """Count one piece of work. flops: of all processes."""
        self._recent_s[kind].append(seconds)
        if kind in STEPS:
            self._steps += 1
            self._steps_s, self._steps_flops = self._steps_s + seconds, self._steps_flops + flops

    def take_speed(self) -> Speed:
        """Returns the speed since the last call; there must have been a step."""
        seconds = max(self._steps_s, 1e-9)
        speed = Speed(
            step_s=seconds / self._steps,
            tokens_per_s=self._steps * self._tokens / seconds,
            flops_per_s=self._steps_flops / seconds / self._processes,
        )
        self._steps, self._steps_s, self._steps_flops = 0, 0.0, 0.0
        return speed

    def left_s(self, state: TrainState) -> float:
        """Returns the seconds that the rest of the run takes, updates and evaluations included."""
        return sum(self._mean_s(kind) * left for kind, left in self._left(state).items())

    def _left(self, state: TrainState) -> dict[Work, int]:
        steps = self._config.training.steps - state.step
        updates = self._schedule.updates_left(state.step, state.stage_updates)
        inside = min(updates, steps) if self._schedule.in_step else 0
        return {
            Work.STEP: steps - inside,
            Work.UPDATING_STEP: inside,
            Work.UPDATE: updates - inside,
            Work.EVALUATION: self._times(state, self._config.evaluation.interval_steps),
            Work.CHECKPOINT: self._times(state, self._config.training.checkpoint_interval_steps),
        }

    def _times(self, state: TrainState, interval: int) -> int:
        """Returns how often something comes that is due every `interval` steps and at the end."""
        steps = self._config.training.steps
        if state.step >= steps:
            return 0
        between = (steps - 1) // interval - state.step // interval if interval else 0
        return between + 1

    def _mean_s(self, kind: Work) -> float:
        """Returns the mean time of a kind of work; of one not yet seen, what its FLOPs suggest."""
        recent_s = self._recent_s[kind]
        if recent_s:
            return sum(recent_s) / len(recent_s)
        seen = [other for other, flops in self._flops.items() if flops and self._recent_s[other]]
        if kind not in self._flops or not seen:
            return 0.0
        return self._mean_s(seen[0]) * self._flops[kind] / self._flops[seen[0]]
