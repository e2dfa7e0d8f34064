"""What the loop says about a step, an update or an evaluation: to the terminal and to the files.

Every method is called by all ranks, since what it reports is gathered; the main process writes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from megatron_dwm.bilevel import Hypergradient
from megatron_dwm.config.load import save_config
from megatron_dwm.data.batch import Batch
from megatron_dwm.training.progress import Progress
from megatron_dwm.training.records import (
    MetricsWriter,
    Source,
    WeightRecorder,
    weight_statistics,
)
from megatron_dwm.training.session import Session
from megatron_dwm.training.stages import Stage
from megatron_dwm.training.step import StepResult, UpdateResult, signal_to_noise_of
from megatron_dwm.training.trust import Watch

# Rows of a global batch, read where they are needed.
Rows = Callable[[slice], Batch]


class Reporter:
    """The records of one run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        config, runtime = session.config, session.runtime
        self._place = session.run_dir.stat()
        self.progress = Progress(
            shown=runtime.is_main,
            first_step=session.state.step,
            steps=config.training.steps,
            tokens_per_step=session.tokens_per_step,
            interval_steps=config.training.log_interval_steps,
        )
        warn = self.progress.warn
        self._metrics = (
            MetricsWriter(session.run_dir, tensorboard=config.logging.tensorboard, warn=warn)
            if runtime.is_main
            else None
        )
        self._weights = WeightRecorder(session.run_dir) if runtime.is_main else None
        self._watch = Watch(config, warn=warn)
        self._clock_s = time.monotonic()
        self._said_gone = False

    def step(self, stage: Stage, result: StepResult) -> None:
        """A step that was taken; the state counts it already."""
        session, state = self._session, self._session.state
        whole_n = session.gather(result.weights_n)
        self.progress.step(state.step, stage.number, result)
        statistics = weight_statistics(whole_n)
        self._watch.effective_sample_size(statistics["weight_effective_sample_size"])
        self._write(
            stage,
            "train",
            loss=result.loss,
            weighted_loss=result.weighted_loss,
            lr=result.learning_rate,
            grad_norm=result.grad_norm,
            **statistics,
        )
        interval = session.config.logging.weights_interval_steps
        if interval and state.step % interval == 0 and result.update is None:
            # An update inside the step records the same weights, with alignments.
            rows, sources = partial(session.step_rows, state.step - 1), self._sources_of_step()
            self._record_weights(stage, rows, whole_n, None, sources)

    def update(self, stage: Stage, result: UpdateResult, rows: Rows) -> None:
        """A weighting update; the state counts it already."""
        found = result.hypergradient
        weights_n = self._session.gather(result.update.weights_n)
        alignment_n = self._session.gather(found.alignment_n)
        self._write(
            stage,
            "weighting",
            update=self._session.state.updates,
            loss=result.train_loss,
            val_loss=found.val_loss,
            grad_norm=found.grad_norm,
            weighting_grad_norm=result.update.grad_norm,
            weighting_gradient_cosine=result.update.cosine,
            alignment_mean=float(alignment_n.mean()),
            alignment_std=float(alignment_n.std(correction=0)),
            **self._noise(found),
            **weight_statistics(weights_n),
        )
        if self._session.config.logging.weights_interval_steps:
            self._record_weights(stage, rows, weights_n, alignment_n, self._sources_of_update())

    def skipped(self, stage: Stage, reason: str, ids: range) -> None:
        """A step that was left out; the state counts it already."""
        samples = {"first_sample": ids.start, "last_sample": ids.stop - 1}
        self._write(stage, "skipped", reason=reason, **samples)
        self.progress.warn(
            f"step {self._session.state.step} is skipped: {reason}; samples {ids.start} to "
            f"{ids.stop - 1}"
        )

    def skipped_update(self, stage: Stage) -> None:
        """A weighting update that was left out; the state counts it already."""
        number = self._session.state.updates
        reason = "its losses or alignments are not finite"
        self._write(stage, "skipped_update", update=number, reason=reason)
        self.progress.warn(f"weighting update {number} is skipped: {reason}")

    def evaluation(self, stage: Stage, losses: dict[str, float], words: dict) -> None:
        """Held-out losses, and what is known of last words."""
        mean = sum(losses.values()) / len(losses)
        perplexities = {name: math.exp(min(loss, 700.0)) for name, loss in losses.items()}
        figures = {"domain_loss": losses, "domain_perplexity": perplexities, **words}
        self._write(stage, "evaluation", loss=mean, **figures)
        text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self.progress.note(f"step {self._session.state.step} held-out loss: {text}")

    def flush(self) -> None:
        """Bring the weight records to the disk, and the clock up to now."""
        self._lap()
        if self._weights is None:
            return
        try:
            self._weights.flush(self._session.state.updates)
        except OSError as error:
            self.progress.warn(f"weights: {error}; records are kept until there is room")

    def back_to_state(self) -> None:
        """Forget what comes after the session's state, which a checkpoint has just replaced."""
        if self._metrics is not None and self._weights is not None:
            self._weights.forget()
            self._metrics.reopen_at(self._session.state)
        self._clock_s = time.monotonic()

    def close(self) -> None:
        """Leave terminal and files tidy."""
        self.progress.close()
        if self._metrics is not None:
            self._metrics.close()

    def _noise(self, found: Hypergradient) -> dict[str, float]:
        """The measured agreement and signal-to-noise, where they were measured."""
        if found.halves_2n is None:
            return {}
        agreement, ratio = signal_to_noise_of(self._session, found.halves_2n)
        self._watch.signal_to_noise(ratio)
        return {"alignment_agreement": agreement, "alignment_signal_to_noise": ratio}

    def _sources_of_step(self) -> list[Source]:
        """Of the rows of a training batch: target passages come last."""
        mixed = self._session.num_mixed
        return ["training"] * (self._session.global_batch_size - mixed) + ["target"] * mixed

    def _sources_of_update(self) -> list[Source]:
        """Of the rows of an update: a batch of its own, or that of the step under way."""
        if self._session.weighting_data is None:
            return self._sources_of_step()
        return ["update"] * self._session.global_batch_size

    def _record_weights(
        self,
        stage: Stage,
        rows: Rows,
        weights_n: Tensor,
        alignment_n: Tensor | None,
        sources: Sequence[Source],
    ) -> None:
        """Keep the weights of a global batch (main process only)."""
        if self._weights is not None:
            step, whole = self._session.state.step, rows(slice(0, self._session.global_batch_size))
            self._weights.add(step, stage.number, whole, weights_n, alignment_n, sources=sources)

    def _write(self, stage: Stage, phase: str, **values: object) -> None:
        if self._metrics is None:
            return
        self._lap()
        self._make_whole()
        state = self._session.state
        line = {"step": state.step, "stage": stage.number, "phase": phase, **values}
        counts = {
            "tokens": state.tokens,
            "flops": self._session.compute.spent(state),
            "seconds": round(state.seconds, 3),
        }
        self._metrics.write({**line, **counts})

    def _make_whole(self) -> None:
        """Make metrics.jsonl and config.yaml again if they were removed.

        Without them the directory holds no run that could go on or be read.
        If the directory itself is gone or another, the run ends instead (runtime/stop.py).
        """
        assert self._metrics is not None
        run_dir, config = self._session.run_dir, self._session.run_dir / "config.yaml"
        try:
            if not os.path.samestat(run_dir.stat(), self._place):
                return
            self._metrics.make_whole()
            if not config.is_file():
                save_config(self._session.config, config)
                self.progress.warn(f"{config} was removed: it is made again")
        except FileNotFoundError:
            return
        except OSError as error:
            if not self._said_gone:
                self._said_gone = True
                self.progress.warn(
                    f"metrics.jsonl or config.yaml was removed from {run_dir} and cannot be made "
                    f"again: {error.strerror}"
                )

    def _lap(self) -> None:
        """Add the time since the last lap to the run's."""
        now_s = time.monotonic()
        self._session.state.seconds += now_s - self._clock_s
        self._clock_s = now_s
