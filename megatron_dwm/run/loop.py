"""The training loop. It decides what comes next, and when to save, stop and roll back.

    for step in the remaining steps:
        for each update that is due before it:          # LLM frozen
            weighting_update(batch, passages)           # or read_target(passages)
        train_step(batch)                               # taken, skipped or a spike
        evaluate, save and stop if due

With `weighting.update_on training` or `ahead`, and for a method that weighs a batch by its own
alignments, an update comes inside the preceding step.

The run can be stopped, saved and resumed between any two of these: requests are polled after every
step and update, and between the batches of an evaluation.
"""

from __future__ import annotations

from functools import partial

import torch

from megatron_dwm.config import Config
from megatron_dwm.run import limits
from megatron_dwm.run.job import Job
from megatron_dwm.run.reporter import Reporter
from megatron_dwm.run.step_batch import step_batch
from megatron_dwm.run.upkeep import Upkeep
from megatron_dwm.runtime.profiling import Window, phase
from megatron_dwm.training import (
    Ahead,
    OwnUpdateResult,
    Skipped,
    Spike,
    StepOutcome,
    Taken,
    TargetRead,
    UpdateResult,
    UpperLevel,
    read_target,
    train_step,
    weighting_update,
)


class Loop:
    """Runs the remaining steps of a run."""

    def __init__(
        self, job: Job, config: Config, report: Reporter, upkeep: Upkeep, window: Window
    ) -> None:
        self._job, self._config, self._state = job, config, job.state
        self._report, self._upkeep, self._window = report, upkeep, window

    def run(self) -> bool:
        """Train to the last step, or until a request to stop (collective).

        Returns True if the final state is saved.
        """
        try:
            going = self._advance()
        except BaseException:
            self._report.write_what_waits()
            raise
        if not going:
            self._report.terminal.log(
                f"stopped at step {self._state.step} ({self._upkeep.stop_reason}); continue with "
                "--run.resume true"
            )
        self._window.close()
        saved = self._upkeep.end()
        if saved and not going:
            self._upkeep.note_stop()
        return saved

    def _advance(self) -> bool:
        """Take what is left of the run; False after a request to stop."""
        going = self._upkeep.begin()
        while going and self._state.step < self._config.training.steps:
            self._window.before_step(self._state.step + 1)
            going = self._make_updates() and self._make_step()
        return going

    def _make_updates(self) -> bool:
        """Make the updates that are due with the LLM frozen; False after a request to stop."""
        job, state = self._job, self._state
        due = 0 if job.schedule.in_step else job.schedule.updates_before(state.step)
        while state.stage_updates < due:
            with phase("weighting update"):
                result = self._update()
            state.updates, state.stage_updates = state.updates + 1, state.stage_updates + 1
            origins = partial(job.feed.update_origins, state.updates - 1)
            self._report.update(self._job.stage, result, origins)
            # After a single update the step that follows counts for checkpoints.
            if not self._upkeep.after_update(counts=due > 1):
                return False
        return True

    def _update(self) -> UpdateResult | OwnUpdateResult | TargetRead | None:
        """Make the next update with the LLM frozen."""
        job, state = self._job, self._state
        if not job.schedule.fresh:
            return read_target(job.learner, job.method, job.feed.validation(state.updates))
        # An update of the method's own counts its passes itself.
        weighed = job.method.weighs(state) and not job.method.own_updates
        batch, upper = job.feed.update(state.updates), _upper_level(self._job, self._config)
        result = weighting_update(job.learner, job.method, batch, upper, state)
        state.weighings += weighed
        return result

    def _make_step(self) -> bool:
        """Make one step and what is due after it; False after a request to stop."""
        state = self._state
        if state.step + 1 in state.passed_over:
            self._job.learner.scheduler.step(increment=1)
            self._skip("its loss was a spike")
        else:
            updates = self._updates_inside
            outcome = self._outcome(_upper_level(self._job, self._config) if updates else None)
            if isinstance(outcome, Spike):
                self._roll_back(outcome)
                return self._upkeep.begin()
            if isinstance(outcome, Skipped):
                state.skipped_in_a_row += 1
                self._skip(f"loss {outcome.loss}, gradient norm {outcome.grad_norm}")
                if outcome.update is not None:
                    self._count_update(outcome.update)
            else:
                self._take(outcome, updates=updates)
        return self._upkeep.after_step()

    @property
    def _updates_inside(self) -> bool:
        """True if the next step makes the update that is due after it."""
        schedule = self._job.schedule
        return schedule.in_step and schedule.updates_before(self._state.step + 1) > 0

    def _outcome(self, upper: UpperLevel | None) -> StepOutcome:
        """Run the next step and return its outcome."""
        job, state = self._job, self._state
        job.method.before_step(state)
        weighed = job.method.weighs(state)
        with phase("step"):
            outcome = train_step(
                job.learner,
                job.method,
                step_batch(job),
                state,
                upper=upper,
                largest_loss=limits.largest_loss(self._config.training, state.mean_loss),
            )
        state.weighings += weighed
        return outcome

    def _take(self, outcome: Taken, *, updates: bool) -> None:
        """Count and report a step that was taken; `updates` is true if it had an update inside."""
        state, feed = self._state, self._job.feed
        state.step, state.stage_updates, state.skipped_in_a_row = state.step + 1, 0, 0
        state.tokens += feed.global_batch_size * self._config.data.sequence_length
        state.mean_loss = limits.running_mean(state.mean_loss, outcome.loss)
        origins = partial(feed.origins, state.step - 1)
        read_rows = partial(feed.first_rows, state.step - 1)
        self._report.step(self._job.stage, outcome, origins, read_rows)
        if updates:
            self._count_update(outcome.update)

    def _count_update(self, update: UpdateResult | None) -> None:
        """Count and report the update inside the last step; None: it was not made."""
        state, feed = self._state, self._job.feed
        state.updates += 1
        self._report.update(self._job.stage, update, partial(feed.origins, state.step - 1))

    def _skip(self, reason: str) -> None:
        """Count and report the next step as skipped."""
        state = self._state
        samples = self._job.feed.sample_range(state.step)
        state.step, state.stage_updates, state.skipped = state.step + 1, 0, state.skipped + 1
        self._report.skipped(self._job.stage, reason, samples)
        self._upkeep.fail_if(limits.too_many_skipped(self._config.training, state, reason, samples))

    def _roll_back(self, spike: Spike) -> None:
        """Return to the last checkpoint; the batch of the spike will be skipped."""
        state, number = self._state, self._state.step + 1
        passed_over = sorted({*state.passed_over, number})
        self._upkeep.fail_if(limits.too_many_spikes(self._config.training, passed_over, number))
        self._upkeep.load_newest()
        state.passed_over = passed_over
        self._report.terminal.warn(
            f"step {number}: loss {spike.loss:.4g} above {spike.limit:.4g}, a spike; back to step "
            f"{state.step}, and its batch is passed over"
        )


def _upper_level(job: Job, config: Config) -> UpperLevel:
    """Returns the validation batch and the options of the next update."""
    updates, bilevel, interval = job.state.updates, config.bilevel, job.costs.noise_interval
    measure_noise = interval > 0 and updates % interval == 0
    return UpperLevel(
        passages=job.feed.validation(updates, halves=measure_noise),
        measure_noise=measure_noise,
        estimator=bilevel.estimator,
        sketch_size=job.method.sketch_size,
        inner_optimizer=bilevel.inner_optimizer,
        ahead=_ahead(config) if job.schedule.ahead else None,
    )


def _ahead(config: Config) -> Ahead:
    dtype = torch.bfloat16 if config.keeps_direction_in_bf16 else torch.float32
    return Ahead(fraction=config.weighting.probe_fraction, dtype=dtype)
