"""Lines on the terminal about steps, updates, evaluations and checkpoints, and curves of the speed.

The main process prints them; every rank keeps the times, since it has the clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import Tensor

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.run.files import RunFiles
from megatron_dwm.run.pace import Pace, Speed, Work
from megatron_dwm.run.records import STATISTICS
from megatron_dwm.run.terminal import Terminal
from megatron_dwm.runtime.memory import peak_bytes
from megatron_dwm.training import Taken
from megatron_dwm.weighting.costs import Costs
from megatron_dwm.weighting.schedule import Schedule

_SIZE = STATISTICS.index("weight_effective_sample_size")
_GIB = 2**30
_TERA = 1e12
# Name in metrics.jsonl -> name in a line.
_OF_AN_UPDATE = {
    "val_loss": "validation loss",
    "weight_effective_sample_size": "effective sample size",
    "alignment_signal_to_noise": "signal-to-noise",
}


class Progress:
    """Prints the lines of one run."""

    def __init__(
        self,
        terminal: Terminal,
        pace: Pace,
        state: TrainState,
        schedule: Schedule,
        costs: Costs,
        device: torch.device,
        files: RunFiles | None,
    ) -> None:
        """files: None except on the main process."""
        self._terminal, self._pace, self._state = terminal, pace, state
        self._schedule, self._costs, self._device = schedule, costs, device
        self._files = files
        self._spent_on_weights = costs.spent_on_weights(state)
        self._step_of_last_update_line: int | None = None

    def step(self, stage: int, outcome: Taken, statistics: Tensor, seconds: float) -> None:
        """Show a step. statistics: `weight_statistics` of the global batch, on the device."""
        step, last = self._state.step, self._schedule.steps
        self._count_step(outcome, seconds)
        self._terminal.step(step, stage)
        if not self._terminal.has_line(step, last):
            return
        speed, memory = self._pace.take_speed(), peak_bytes(self._device)
        left = timedelta(seconds=round(self._pace.left_s(self._state)))
        used = "" if memory is None else f", {memory / _GIB:.2f} GiB"
        self._terminal.show_beside_bar(f"loss {outcome.loss:.3f}, {speed.tokens_per_s:,.0f} tok/s")
        self._terminal.log(
            f"step {step}/{last} stage {stage} loss {outcome.loss:.4f} "
            f"lr {outcome.learning_rate:.2e} grad norm {outcome.grad_norm:.3f} "
            f"effective sample size {float(statistics[_SIZE]):.3f}, {speed.step_s:.3g} s a step, "
            f"{speed.tokens_per_s:,.0f} tokens/s, {speed.flops_per_s / _TERA:.3g} TFLOP/s a process"
            f"{used}, {left} left"
        )
        if self._files is not None:
            self._files.curves(step, _curves(speed, memory))

    def update(self, stage: int, values: Mapping[str, object], seconds: float) -> None:
        """Show a weighting update. values: its keys in metrics.jsonl."""
        if not self._schedule.in_step:
            self._pace.add(Work.UPDATE, seconds)
        state, schedule = self._state, self._schedule
        self._terminal.update(state.stage_updates, stage)
        if not self._update_has_line():
            return
        self._step_of_last_update_line = state.step
        left = schedule.updates_left(state.step, state.stage_updates)
        shown = {name: values.get(key) for key, name in _OF_AN_UPDATE.items()}
        text = " ".join(f"{k} {v:.3f}" for k, v in shown.items() if isinstance(v, float))
        self._terminal.log(f"update {state.updates}/{state.updates + left} stage {stage} {text}")

    def evaluation(self, losses: Mapping[str, float], seconds: float) -> None:
        """Show held-out losses by domain."""
        self._pace.add(Work.EVALUATION, seconds)
        text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self._terminal.log(f"step {self._state.step} held-out loss: {text}")

    def checkpoint(self, seconds: float) -> None:
        """Count the time that the loop waited for a checkpoint; who wrote it prints the line."""
        self._pace.add(Work.CHECKPOINT, seconds)

    def _count_step(self, outcome: Taken, seconds: float) -> None:
        on_weights = self._costs.spent_on_weights(self._state)
        flops = self._costs.llm_step + on_weights - self._spent_on_weights
        self._spent_on_weights = on_weights
        if outcome.update is None:
            self._pace.add(Work.STEP, seconds, flops)
        else:
            self._pace.add(Work.UPDATING_STEP, seconds, flops + self._costs.update)

    def _update_has_line(self) -> bool:
        """True at intervals of updates where many are made at once, else at intervals of steps."""
        if self._schedule.updates_each > 1:
            return self._terminal.has_line(self._state.stage_updates, self._schedule.updates_each)
        before = self._step_of_last_update_line
        return before is None or self._state.step - before >= self._terminal.interval_steps


def _curves(speed: Speed, memory_bytes: int | None) -> dict[str, float]:
    found = {
        "train/step_seconds": speed.step_s,
        "train/tokens_per_second": speed.tokens_per_s,
        "train/flops_per_second": speed.flops_per_s,
    }
    return found if memory_bytes is None else {**found, "train/memory_bytes": float(memory_bytes)}
