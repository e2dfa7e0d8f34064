"""What comes between steps and updates: requests, evaluations, checkpoints, the way back."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.checkpoint.load import load_checkpoint
from megatron_dwm.checkpoint.parts import Parts
from megatron_dwm.checkpoint.saver import Saver
from megatron_dwm.config import Config, RunError
from megatron_dwm.run import limits
from megatron_dwm.run.job import Job
from megatron_dwm.run.reporter import Reporter
from megatron_dwm.run.weighting_files import save_method_files
from megatron_dwm.runtime.profiling import phase
from megatron_dwm.runtime.stop import Request, StopPoll
from megatron_dwm.training.evaluation import evaluate
from megatron_dwm.training.optimizer import begin_at


class _StopAsked(Exception):
    """A stop was asked for in the middle of an evaluation."""


class Upkeep:
    """Does what is due at the place where the state of a run stands; every method is collective."""

    def __init__(
        self,
        job: Job,
        config: Config,
        parts: Parts,
        saver: Saver,
        report: Reporter,
        stop: StopPoll,
    ) -> None:
        self._job, self._config, self._parts, self._state = job, config, parts, job.state
        self._saver, self._report, self._stop = saver, report, stop
        self._wants_save = False

    @property
    def stop_reason(self) -> str:
        """Why the run stops, as far as this process knows."""
        return self._stop.reason

    def begin(self) -> bool:
        """Before the first step of a start or after a way back; False if a stop was asked for."""
        return self._poll() and self._evaluate_if_due()

    def after_update(self, *, counts: bool) -> bool:
        """False if a stop was asked for. counts: the update brings a checkpoint nearer."""
        if counts:
            self._ask_for_save(self._state.updates)
        return self._poll()

    def after_step(self) -> bool:
        """False if a stop was asked for."""
        if self._job.schedule.ends_stage(self._state.step):
            self._save_method()
        going = self._evaluate_if_due()
        self._ask_for_save(self._state.step)
        return going and self._poll()

    def end(self) -> bool:
        """Make checkpoint and records whole; False if the state at the end cannot be saved."""
        self._saver.finish()
        saved = self._saver.is_current or self._save(wait=True)
        self._report.close()
        return saved

    def load_newest(self) -> None:
        """Put the run back to its newest checkpoint, if it has one."""
        self._saver.finish()
        if self._saver.newest is not None:
            load_checkpoint(self._parts, self._saver.newest)
            begin_at(self._job.learner.scheduler, self._state.step + 1)
            self._report.back_to_state()
            self._parts.runtime.barrier()

    def end_if(self, problem: str | None) -> None:
        """Raise RunError for a problem that ends the run, checkpoint and records made whole."""
        if problem is not None:
            self._saver.finish()
            self._report.close()
            raise RunError(problem)

    def _evaluate_if_due(self) -> bool:
        """Held-out losses, once for a step; False if a stop was asked for in between, which leaves
        them to the resumed run.
        """
        job, state, config = self._job, self._state, self._config
        last = state.step == config.training.steps
        due = last or state.step % config.evaluation.interval_steps == 0
        if job.held_out is None or not due or state.evaluated_step >= state.step:
            return True
        try:
            with phase("evaluation"):
                found = evaluate(
                    job.learner,
                    job.held_out,
                    batch_size=job.feed.global_batch_size,
                    between=self._poll_inside,
                )
        except _StopAsked:
            return False
        self.end_if(limits.not_finite(found.losses, state.step))
        state.evaluated_step = state.step
        self._report.evaluation(self._job.stage, found)
        return True

    def _ask_for_save(self, count: int) -> None:
        """A checkpoint is due at multiples of the interval, in steps and in updates of phases."""
        interval = self._config.training.checkpoint_interval_steps
        self._wants_save |= interval > 0 and count % interval == 0

    def _poll(self) -> bool:
        """Do what is asked for, the state between two steps or updates; False for a stop."""
        request = self._stop.poll()
        self._saver.finish_if_written()
        if request is Request.STOP:
            return False
        self._wants_save |= request is Request.SAVE
        # In the middle of trouble the last good checkpoint stays the newest.
        if self._wants_save and not self._state.skipped_in_a_row:
            self._wants_save = False
            if not self._saver.is_current:
                self._save(wait=False)
        return True

    def _poll_inside(self) -> None:
        """Only a stop counts inside an evaluation."""
        request = self._stop.poll()
        if request is Request.STOP:
            raise _StopAsked
        self._wants_save |= request is Request.SAVE

    def _save(self, *, wait: bool) -> bool:
        self._report.flush()
        self._save_method()
        with phase("checkpoint"):
            return self._saver.save(wait=wait)

    def _save_method(self) -> None:
        files = self._job.method.files() if self._parts.runtime.is_main else {}
        if files:
            run_dir, warn = Path(self._config.run.dir), self._report.terminal.warn
            save_method_files(files, run_dir, self._job.stage, warn)
