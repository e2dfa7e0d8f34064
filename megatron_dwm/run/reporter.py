"""Reports steps, updates and evaluations of a run to the terminal and to its files.

All ranks call every method, since values are gathered; the main process writes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import LoggingConfig
from megatron_dwm.run.batch_records import BatchRecords, FindOrigins
from megatron_dwm.run.clock import Clock
from megatron_dwm.run.files import RunFiles
from megatron_dwm.run.health import Health
from megatron_dwm.run.progress import Progress
from megatron_dwm.run.step_lines import (
    StepLines,
    batch_statistics,
    named_statistics,
    update_values,
)
from megatron_dwm.run.terminal import Terminal
from megatron_dwm.run.token_records import ReadRows
from megatron_dwm.runtime import Runtime
from megatron_dwm.training import OwnUpdateResult, Taken, TargetRead, UpdateResult
from megatron_dwm.training.evaluation import Evaluation
from megatron_dwm.weighting.costs import Costs

Update = UpdateResult | OwnUpdateResult | TargetRead


class Reporter:
    """Writes the records of one run, and its lines on the terminal."""

    def __init__(
        self,
        state: TrainState,
        costs: Costs,
        runtime: Runtime,
        config: LoggingConfig,
        terminal: Terminal,
        health: Health,
        files: RunFiles | None,
        progress: Progress,
    ) -> None:
        """Start the clock; `files` is None except on the main process."""
        self._state, self._costs, self._runtime, self._config = state, costs, runtime, config
        self.terminal, self._health, self._files = terminal, health, files
        self._progress = progress
        self._clock = Clock(state)
        self._step_lines = StepLines(health, files)
        self._records = BatchRecords(state, runtime, config, files)

    def step(self, stage: int, outcome: Taken, origins: FindOrigins, read_rows: ReadRows) -> None:
        """Report a step that was taken and is already counted in the state."""
        statistics = batch_statistics(outcome.units, self._runtime)
        self._progress.step(stage, outcome, statistics, self._clock.lap())
        values = {
            "loss": outcome.loss,
            "weighted_loss": outcome.weighted_loss,
            "lr": outcome.learning_rate,
            "grad_norm": outcome.grad_norm,
        }
        before, more = self._begun(stage, "train") | values, outcome.statistics
        self._step_lines.add(before, statistics, _counts(self._state, self._costs), more=more)
        if self._state.step % self._config.metrics_interval_steps == 0:
            self._step_lines.write()
        if self._records.is_due() and outcome.update is None:
            # An update inside the step records the same weights, with alignments.
            self._records.weights(stage, origins, outcome.units, None)
            self._records.tokens(stage, origins, outcome.units, read_rows)

    def update(self, stage: int, result: Update | None, origins: FindOrigins) -> None:
        """Report a weighting update, made or skipped, that is already counted in the state."""
        if result is None:
            self._skipped_update(stage)
            return
        if isinstance(result, TargetRead):
            self._write_update(stage, val_loss=result.val_loss)
            return
        runtime, alignment_n = self._runtime, None
        if isinstance(result, UpdateResult):
            alignment_n = result.units.gather(result.hypergradient.known_alignments(), runtime)
            if result.noise is not None:
                self._health.signal_to_noise(result.noise.ratio)
        values = update_values(result, alignment_n)
        statistics = named_statistics(batch_statistics(result.units, runtime))
        self._write_update(stage, **values, **statistics)
        # The step that follows from its own update records the same weights.
        weighs_step = isinstance(result, UpdateResult) and result.weighs_step
        if self._records.is_due() or (self._records.is_on() and not weighs_step):
            self._records.weights(stage, origins, result.units, alignment_n)

    def skipped(self, stage: int, reason: str, samples: range) -> None:
        """Report a step that was skipped and is already counted in the state."""
        first, last = samples.start, samples.stop - 1
        self._write(stage, "skipped", reason=reason, first_sample=first, last_sample=last)
        self.terminal.warn(
            f"step {self._state.step} is skipped: {reason}; samples {first} to {last}"
        )

    def evaluation(self, stage: int, found: Evaluation) -> None:
        """Report held-out losses and the scores of last words."""
        self._health.held_out(found.losses)
        seconds = self._write(stage, "evaluation", **found.columns())
        self._progress.evaluation(found.losses, seconds)

    def checkpoint(self) -> None:
        """Count the time that the loop waited for a checkpoint."""
        self._progress.checkpoint(self._clock.lap())

    def flush(self) -> None:
        """Write all records to the disk, and update the run's clock."""
        self._step_lines.write()
        self._clock.lap()
        if self._files is None:
            return
        try:
            self._files.flush(self._state.updates)
        except OSError as error:
            self.terminal.warn(f"weights: {error}; records are kept until there is room")

    def write_what_waits(self) -> None:
        """Write the lines of finished steps when the run fails; they may explain why.

        The failure is reported by its own error, so another one here is not.
        """
        with suppress(Exception):
            self._step_lines.write()

    def back_to_state(self) -> None:
        """Drop the records after the run's state, which was just loaded from a checkpoint."""
        self._step_lines.drop()
        if self._files is not None:
            self._files.forget()
            self._files.metrics.reopen_at(self._state)
        self._clock.restart()

    def close(self) -> None:
        """Write the remaining records and close terminal and files."""
        self._step_lines.write()
        self.terminal.close()
        if self._files is not None:
            self._files.metrics.close()

    def _skipped_update(self, stage: int) -> None:
        number = self._state.updates
        reason = (
            "its losses, alignments or features are not finite, or no sample that was probed has a "
            "weight above 1e-6"
        )
        self._write(stage, "skipped_update", update=number, reason=reason)
        self.terminal.warn(f"weighting update {number} is skipped: {reason}")

    def _write_update(self, stage: int, **values: object) -> None:
        seconds = self._write(stage, "weighting", update=self._state.updates, **values)
        self._progress.update(stage, values, seconds)

    def _write(self, stage: int, phase: str, **values: object) -> float:
        """Write a line; returns the seconds since the last one."""
        self._step_lines.write()
        seconds = self._clock.lap()
        if self._files is not None:
            self._files.write(
                {**self._begun(stage, phase), **values, **_counts(self._state, self._costs)}
            )
        return seconds

    def _begun(self, stage: int, phase: str) -> dict[str, Any]:
        return {"step": self._state.step, "stage": stage, "phase": phase}


def _counts(state: TrainState, costs: Costs) -> dict[str, Any]:
    """Returns the end of every line: what the run has read, computed and waited for so far."""
    pairs = zip(costs.totals(state), state.flops_offset, strict=True)
    total, weights, updates = (spent + more for spent, more in pairs)
    return {
        "tokens": state.tokens,
        "flops": total,
        "flops_weighting": weights,
        "flops_updates": updates,
        "seconds": round(state.seconds, 3),
    }
