"""The training loop (DESIGN: stages, each begun by its weighting updates).

for stage in stages:
    for _ in range(stage.num_updates):                 # LLM frozen
        weighting update from one exact hypergradient
    for step in stage:                                 # weighting model frozen
        train_step(batch)                              # weights from the policy

With `weighting.update_on training` the last step before a stage makes that stage's update.

Wherever the state stands between two of these things, the run can be stopped, saved and taken up
again: requests are polled after every step and update, and between the batches of an evaluation.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

from megatron_dwm.config import Config, RunError
from megatron_dwm.runtime.profiling import Window, phase
from megatron_dwm.runtime.stop import Request, StopPoll
from megatron_dwm.training.checkpoint import load_checkpoint
from megatron_dwm.training.compute import reads_first
from megatron_dwm.training.guard import LossSpike, running_mean
from megatron_dwm.training.last_words import last_word_figures
from megatron_dwm.training.remarks import remarks
from megatron_dwm.training.reporter import Reporter, Rows
from megatron_dwm.training.saving import Saver
from megatron_dwm.training.session import Session
from megatron_dwm.training.stages import Stage, stage_under_way
from megatron_dwm.training.state import TrainState
from megatron_dwm.training.step import (
    Lesson,
    UpdateResult,
    evaluate,
    train_step,
    weighting_update,
)
from megatron_dwm.training.weighting_files import save_weighting_model


class _Stopped(Exception):
    """The run is to end here."""


class _TakenBack(Exception):
    """The state is an earlier one again."""


def is_finished(config: Config, state: TrainState) -> bool:
    """Whether a run at `state` has nothing left to do."""
    if state.step != config.training.steps:
        return state.step > config.training.steps
    return config.evaluation.path is None or state.evaluated_step == state.step


class Loop:
    """A session in motion."""

    def __init__(
        self,
        session: Session,
        stop: StopPoll,
        fingerprint: dict[str, str],
        newest: Path | None,
    ) -> None:
        """newest: the checkpoint that the session was taken up from, if any."""
        self.session = session
        self._report = Reporter(session)
        self._saver = Saver(session, fingerprint, newest, self._report.progress.warn)
        self._stop = stop
        self._wants_save = False
        runtime = session.runtime
        self._window = Window(session.config.profiling, session.run_dir / "profile", runtime.rank)

    def run(self) -> None:
        """Train from where the state stands to the last step, or until asked to stop (collective).

        Leaves the process with 1 if the state at the end cannot be saved.
        """
        for remark in remarks(self.session):
            self._report.progress.warn(remark)
        self._warn_if_nothing_is_learned()
        self._warn_if_nothing_is_profiled()
        try:
            while not self._runs_through():
                pass
        except _Stopped:
            self._report.progress.note(
                f"stopped at step {self.session.state.step} ({self._stop.reason}); go on with "
                "--run.resume true"
            )
        self._window.close()
        saved = self._saves_the_end()
        self._report.close()
        if not saved:
            sys.exit(1)

    def _runs_through(self) -> bool:
        """All stages from where the state stands; False if a spike of the loss took it back."""
        state = self.session.state
        try:
            self._poll()
            self._evaluate_if_due()
            for stage in self.session.stages:
                if stage.end_step <= state.step:
                    continue
                self._window.before_step(state.step + 1)
                self._update_weighting(stage)
                while state.step < stage.end_step:
                    self._window.before_step(state.step + 1)
                    self._train(stage)
        except _TakenBack:
            return False
        return True

    def _warn_if_nothing_is_learned(self) -> None:
        config, session = self.session.config, self.session
        if config.learns and not any(stage.num_updates for stage in session.stages):
            self._report.progress.warn(
                f"policy {config.policy.name} makes no weighting update in "
                f"{config.training.steps} steps: lower weighting.warmup_steps, raise "
                "weighting.freeze_after or train longer"
            )
        if reads_first(config, session.global_batch_size // session.runtime.data_size):
            self._report.progress.warn(
                "weighting.group global with weighting.encoder llm and several micro-batches: "
                "every step reads its batch once more before it weighs it (a third more time); "
                "weighting.group micro_batch or a larger training.micro_batch_size spares that"
            )

    def _warn_if_nothing_is_profiled(self) -> None:
        profiling, step = self.session.config.profiling, self.session.state.step
        if profiling.tool != "none" and profiling.last_step <= step:
            self._report.progress.warn(
                f"profiling.last_step {profiling.last_step}: the run is at step {step} already, so "
                "nothing is profiled"
            )

    def _update_weighting(self, stage: Stage) -> None:
        session, state = self.session, self.session.state
        if session.weighting_data is None:
            return
        while state.step == stage.first_step and state.stage_updates < stage.num_updates:
            train = session.update_batch(state.updates)
            with phase("weighting update"):
                result = weighting_update(session, train, self._lesson())
            state.updates += 1
            state.stage_updates += 1
            rows = partial(session.update_rows, state.updates - 1)
            self._report_update(stage, result, rows)
            if stage.num_updates > 1:  # a single one is soon followed by a step that counts
                self._ask_for_save(state.updates)
            self._poll()

    def _train(self, stage: Stage) -> None:
        session, state = self.session, self.session.state
        if state.step + 1 in state.passed_over:
            session.scheduler.step(increment=1)
            self._skip(stage, "its loss was a spike")
        else:
            self._step(stage)
        if state.step == stage.end_step and self._is_last_of_its_number(stage):
            self._save_weighting(stage)
        self._evaluate_if_due()
        self._ask_for_save(state.step)
        self._poll()

    def _step(self, stage: Stage) -> None:
        """One step, taken or, if its numbers are not finite, skipped."""
        session, state = self.session, self.session.state
        lesson = self._lesson() if self._learns_in_step(stage) else None
        try:
            with phase("step"):
                batch = session.training_batch(state.step)
                result = train_step(session, batch, lesson, self._largest_loss())
        except LossSpike as spike:
            self._take_back(spike)
        if not result.is_finite:
            state.skipped_in_a_row += 1
            self._skip(stage, f"loss {result.loss}, gradient norm {result.grad_norm}")
            return
        state.step, state.stage_updates, state.skipped_in_a_row = state.step + 1, 0, 0
        state.tokens += session.tokens_per_step
        state.mean_loss = running_mean(state.mean_loss, result.loss)
        self._report.step(stage, result)
        if lesson is not None:
            state.updates += 1
            rows = partial(session.step_rows, state.step - 1)
            self._report_update(stage, result.update, rows)

    def _skip(self, stage: Stage, reason: str) -> None:
        """Count the step that comes as done without having taken it."""
        session, state = self.session, self.session.state
        ids = session.data.ids_of_step(state.step, session.global_batch_size)
        state.step, state.stage_updates, state.skipped = state.step + 1, 0, state.skipped + 1
        self._report.skipped(stage, reason, ids)
        if state.skipped_in_a_row > session.config.training.max_skipped_steps:
            self._close()
            raise RunError(
                f"step {state.step}: {reason}; {state.skipped_in_a_row} steps in a row were not "
                f"finite (training.max_skipped_steps {session.config.training.max_skipped_steps}); "
                f"samples {ids.start} to {ids.stop - 1}; go on from the last checkpoint with a "
                "smaller training.learning_rate, or look at these samples"
            )

    def _report_update(self, stage: Stage, result: UpdateResult | None, rows: Rows) -> None:
        if result is None:
            self._report.skipped_update(stage)
        else:
            self._report.update(stage, result, rows)

    def _largest_loss(self) -> float | None:
        """The loss above which a batch is a spike; None where none is."""
        factor, mean = self.session.config.training.spike_factor, self.session.state.mean_loss
        return factor * mean if factor and mean is not None else None

    def _take_back(self, spike: LossSpike) -> NoReturn:
        """Return to the last checkpoint, to pass over this batch when its turn comes again."""
        session, number = self.session, self.session.state.step + 1
        passed_over = sorted({*session.state.passed_over, number})
        self._stop_if_all_is_spikes(passed_over, number)
        self._saver.finish()
        if self._saver.newest is not None:
            load_checkpoint(session, self._saver.newest)
            self._report.back_to_state()
            session.runtime.barrier()
        session.state.passed_over = passed_over
        self._report.progress.warn(
            f"step {number}: {spike}, a spike; back to step {session.state.step}, and its batch "
            "is passed over"
        )
        raise _TakenBack

    def _close(self) -> None:
        """Before the run ends in trouble: checkpoint and records become whole."""
        self._saver.finish()
        self._report.close()

    def _stop_if_all_is_spikes(self, passed_over: list[int], number: int) -> None:
        """As with numbers that are not finite: so many in a row are no accident of a batch."""
        limit = self.session.config.training.max_skipped_steps
        if set(range(number - limit, number + 1)) <= set(passed_over):
            self._close()
            raise RunError(
                f"step {number}: the losses of {limit + 1} batches in a row were spikes "
                f"(training.max_skipped_steps {limit}, training.spike_factor "
                f"{self.session.config.training.spike_factor:g}); go on from the last checkpoint "
                "with a smaller training.learning_rate or a larger factor"
            )

    def _lesson(self) -> Lesson:
        updates, interval = self.session.state.updates, self.session.compute.noise_interval
        measure_noise = interval > 0 and updates % interval == 0
        val = self.session.validation_batch(updates, halves=measure_noise)
        return Lesson(val=val, measure_noise=measure_noise)

    def _learns_in_step(self, stage: Stage) -> bool:
        """Whether the step that comes makes the update of the next stage."""
        session = self.session
        if session.config.weighting.update_on != "training":
            return False
        border = session.state.step + 1
        return any(later.first_step == border and later.num_updates for later in session.stages)

    def _evaluate_if_due(self) -> None:
        """Held-out losses, once for a step; a stop in between leaves them to the resumed run."""
        session, state = self.session, self.session.state
        config = session.config
        last = state.step == config.training.steps
        due = last or state.step % config.evaluation.interval_steps == 0
        if session.evaluation is None or not due or state.evaluated_step >= state.step:
            return
        with phase("evaluation"):
            losses = evaluate(session, self._poll_inside)
            words = last_word_figures(session, self._poll_inside)
        if not all(map(math.isfinite, losses.values())):
            self._close()
            raise RunError(
                f"step {state.step}: held-out loss {losses}; go on from the last checkpoint with a "
                "smaller training.learning_rate"
            )
        state.evaluated_step = state.step
        self._report.evaluation(self._stage(), losses, words)

    def _stage(self) -> Stage:
        return stage_under_way(self.session.stages, self.session.state)

    def _ask_for_save(self, count: int) -> None:
        """A checkpoint is due at multiples of the interval, in steps and in updates of phases."""
        interval = self.session.config.training.checkpoint_interval_steps
        self._wants_save |= interval > 0 and count % interval == 0

    def _poll(self) -> None:
        """Do what is asked for; the state stands between two steps or updates."""
        request = self._stop.poll()
        self._saver.finish_if_written()
        if request is Request.STOP:
            raise _Stopped
        self._wants_save |= request is Request.SAVE
        # In the middle of trouble the last good checkpoint stays the newest.
        if self._wants_save and not self.session.state.skipped_in_a_row:
            self._wants_save = False
            if not self._saver.is_current:
                self._save(wait=False)

    def _poll_inside(self) -> None:
        """Only a stop counts inside an evaluation."""
        request = self._stop.poll()
        if request is Request.STOP:
            raise _Stopped
        self._wants_save |= request is Request.SAVE

    def _save(self, *, wait: bool) -> bool:
        self._report.flush()
        self._save_weighting(self._stage())
        with phase("checkpoint"):
            return self._saver.save(wait=wait)

    def _saves_the_end(self) -> bool:
        """Whether the newest checkpoint has the state at the end, written now if need be."""
        self._saver.finish()
        return self._saver.is_current or self._save(wait=True)

    def _save_weighting(self, stage: Stage) -> None:
        save_weighting_model(self.session, stage, self._report.progress.warn)

    def _is_last_of_its_number(self, stage: Stage) -> bool:
        later = [other for other in self.session.stages if other.first_step >= stage.end_step]
        return all(other.number != stage.number for other in later)
