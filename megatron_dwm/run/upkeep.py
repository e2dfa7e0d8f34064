"""The work between steps and updates: requests, evaluations, checkpoints, rolling back."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.checkpoint.parts import Parts
from megatron_dwm.checkpoint.saver import Saver
from megatron_dwm.config import Config, RunError
from megatron_dwm.files.run_names import STOPPED
from megatron_dwm.run import limits
from megatron_dwm.run.job import Job, load_job
from megatron_dwm.run.reporter import Reporter
from megatron_dwm.run.weighting_files import save_method_files
from megatron_dwm.runtime.profiling import phase
from megatron_dwm.runtime.stop import Request, StopPoll
from megatron_dwm.training.evaluation import evaluate


class _StopRequested(Exception):
    """A request to stop came during an evaluation."""


class Upkeep:
    """Evaluates, saves and stops a run when due; every method is collective."""

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
        """The reason why the run stops, as far as this process knows."""
        return self._stop.reason

    def note_stop(self) -> None:
        """Mark the run directory if the file `stop` ended the run (main process)."""
        if not self._stop.found_file:
            return
        try:
            (Path(self._config.run.dir) / STOPPED).touch()
        except OSError as error:
            self._report.terminal.warn(f"{self._config.run.dir}: no mark of the stop: {error}")

    def begin(self) -> bool:
        """Do what is due at a start or after rolling back; False after a request to stop."""
        return self._poll() and self._evaluate_if_due()

    def after_update(self, *, counts: bool) -> bool:
        """Do what is due after an update; False after a request to stop.

        counts: the update counts toward the next checkpoint.
        """
        if counts:
            self._save_if_due(self._state.updates)
        return self._poll()

    def after_step(self) -> bool:
        """Do what is due after a step; False after a request to stop."""
        if self._job.schedule.ends_stage(self._state.step):
            self._save_method()
        going = self._evaluate_if_due()
        self._save_if_due(self._state.step)
        return going and self._poll()

    def end(self) -> bool:
        """Complete checkpoint and records; False if the final state could not be saved."""
        self._saver.finish()
        saved = self._saver.is_current or self._save(wait=True)
        self._report.close()
        return saved

    def load_newest(self) -> None:
        """Return the run to its newest checkpoint, if it has one."""
        self._saver.finish()
        if self._saver.newest is not None:
            load_job(self._job, self._parts, self._saver.newest)
            self._report.back_to_state()
            self._parts.runtime.barrier()

    def fail_if(self, problem: str | None) -> None:
        """If there is a problem, complete checkpoint and records and raise RunError."""
        if problem is not None:
            self._saver.finish()
            self._report.close()
            raise RunError(problem)

    def _evaluate_if_due(self) -> bool:
        """Evaluate once at a step where it is due; False after a request to stop.

        A request to stop ends the evaluation, and the resumed run makes it again.
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
        except _StopRequested:
            return False
        self.fail_if(limits.not_finite(found.losses, state.step))
        state.evaluated_step = state.step
        self._report.evaluation(self._job.stage, found)
        return True

    def _save_if_due(self, count: int) -> None:
        """Request a checkpoint if `count`, of steps or updates, is a multiple of the interval."""
        interval = self._config.training.checkpoint_interval_steps
        self._wants_save |= interval > 0 and count % interval == 0

    def _poll(self) -> bool:
        """Handle requests between two steps or updates; False after a request to stop."""
        request = self._stop.poll()
        self._saver.finish_if_written()
        if request is Request.STOP:
            return False
        self._wants_save |= request is Request.SAVE
        # While steps are being skipped, the last good checkpoint stays the newest.
        if self._wants_save and not self._state.skipped_in_a_row:
            self._wants_save = False
            if not self._saver.is_current:
                self._save(wait=False)
        return True

    def _poll_inside(self) -> None:
        """Handle requests during an evaluation, where only a stop acts at once."""
        request = self._stop.poll()
        if request is Request.STOP:
            raise _StopRequested
        self._wants_save |= request is Request.SAVE

    def _save(self, *, wait: bool) -> bool:
        self._report.flush()
        self._save_method()
        with phase("checkpoint"):
            saved = self._saver.save(wait=wait)
        self._report.checkpoint()
        return saved

    def _save_method(self) -> None:
        files = self._job.method.files() if self._parts.runtime.is_main else {}
        if files:
            run_dir, warn = Path(self._config.run.dir), self._report.terminal.warn
            save_method_files(files, run_dir, self._job.stage, warn)
