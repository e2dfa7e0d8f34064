"""The training loop (DESIGN: stages, each begun by its weighting updates).

for stage in stages:
    for _ in range(stage.num_updates):                 # LLM frozen
        weighting update from one exact hypergradient
    for step in stage:                                 # weighting model frozen
        train_step(batch)                              # weights from the policy

With `weighting.update_on training` the last step before a stage makes that stage's update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_dwm.bilevel import Hypergradient
from megatron_dwm.data.batch import Batch
from megatron_dwm.runtime.profiling import Window, phase
from megatron_dwm.training.checkpoint import save_checkpoint
from megatron_dwm.training.compute import reads_first
from megatron_dwm.training.last_words import last_word_figures
from megatron_dwm.training.progress import Progress
from megatron_dwm.training.records import MetricsWriter, WeightRecorder, weight_statistics
from megatron_dwm.training.session import Session
from megatron_dwm.training.stages import Stage
from megatron_dwm.training.step import (
    Lesson,
    StepResult,
    UpdateResult,
    evaluate,
    signal_to_noise_of,
    train_step,
    weighting_update,
)
from megatron_dwm.training.trust import Watch
from megatron_dwm.weighting import LearningPolicy

# Rows of a global batch, read where they are needed.
Rows = Callable[[slice], Batch]


class Loop:
    """A session in motion: the loop, and what it reports on the way."""

    def __init__(self, session: Session) -> None:
        self.session = session
        config, runtime = session.config, session.runtime
        self._metrics = (
            MetricsWriter(session.run_dir, tensorboard=config.logging.tensorboard)
            if runtime.is_main
            else None
        )
        self._weights = WeightRecorder(session.run_dir) if runtime.is_main else None
        self._progress = Progress(
            shown=runtime.is_main,
            first_step=session.state.step,
            steps=config.training.steps,
            tokens_per_step=session.tokens_per_step,
            interval_steps=config.training.log_interval_steps,
        )
        self._watch = Watch(config, warn=self._progress.warn)
        self._window = Window(config.profiling, session.run_dir / "profile", runtime.rank)
        self._clock_s = time.monotonic()

    def run(self) -> None:
        """Train from where the state stands to the last step (collective)."""
        state = self.session.state
        self._warn_if_nothing_is_learned()
        for stage in self.session.stages:
            if stage.end_step <= state.step:
                continue
            self._window.before_step(state.step + 1)
            self._update_weighting(stage)
            while state.step < stage.end_step:
                self._window.before_step(state.step + 1)
                self._train(stage)
            if self._is_last_of_its_number(stage):
                self._save_weighting(stage)
        self._close()

    def _warn_if_nothing_is_learned(self) -> None:
        config, session = self.session.config, self.session
        if config.learns and not any(stage.num_updates for stage in session.stages):
            self._progress.warn(
                f"policy {config.policy.name} makes no weighting update in "
                f"{config.training.steps} steps: lower weighting.warmup_steps, raise "
                "weighting.freeze_after or train longer"
            )
        if reads_first(config, session.global_batch_size // session.runtime.data_size):
            self._progress.warn(
                "weighting.group global with weighting.encoder llm and several micro-batches: "
                "every step reads its batch once more before it weighs it (a third more time); "
                "weighting.group micro_batch or a larger training.micro_batch_size spares that"
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
            self._report_update(stage, result, partial(session.update_rows, state.updates - 1))

    def _train(self, stage: Stage) -> None:
        session, state = self.session, self.session.state
        batch = session.training_batch(state.step)
        lesson = self._lesson() if self._learns_in_step(stage) else None
        with phase("step"):
            result = train_step(session, batch, lesson)
        state.step += 1
        state.stage_updates = 0
        state.tokens += session.tokens_per_step
        self._report_step(stage, result)
        if result.update is not None:
            state.updates += 1
            self._report_update(stage, result.update, partial(session.step_rows, state.step - 1))
        last = state.step == session.config.training.steps
        if session.evaluation and (
            last or state.step % session.config.evaluation.interval_steps == 0
        ):
            self._evaluate(stage)
        interval = session.config.training.checkpoint_interval_steps
        if last or (interval and state.step % interval == 0):
            self._checkpoint()

    def _lesson(self) -> Lesson:
        updates = self.session.state.updates
        return Lesson(
            val=self.session.validation_batch(updates), measure_noise=self._measures_noise()
        )

    def _learns_in_step(self, stage: Stage) -> bool:
        """Whether the step that comes makes the update of the next stage."""
        session = self.session
        if session.config.weighting.update_on != "training":
            return False
        border = session.state.step + 1
        return any(later.first_step == border and later.num_updates for later in session.stages)

    def _report_step(self, stage: Stage, result: StepResult) -> None:
        session, state = self.session, self.session.state
        whole_n = session.gather(result.weights_n)
        finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        if not finite or not bool(torch.isfinite(whole_n).all()):
            ids = session.data.ids_of_step(state.step - 1, session.global_batch_size)
            raise FloatingPointError(
                f"step {state.step}: loss {result.loss}, grad norm {result.grad_norm}; "
                f"samples {ids.start} to {ids.stop - 1}"
            )
        self._progress.step(state.step, stage.number, result)
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
        if interval and state.step % interval == 0:
            self._record_weights(stage, partial(session.step_rows, state.step - 1), whole_n, None)

    def _report_update(self, stage: Stage, result: UpdateResult, rows: Rows) -> None:
        state, found = self.session.state, result.hypergradient
        weights_n = self.session.gather(result.update.weights_n)
        alignment_n = self.session.gather(found.alignment_n)
        if not math.isfinite(found.val_loss) or not bool(torch.isfinite(alignment_n).all()):
            raise FloatingPointError(
                f"weighting update {state.updates}: validation loss {found.val_loss}, "
                f"gradient norm {found.grad_norm}"
            )
        self._write(
            stage,
            "weighting",
            update=state.updates,
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
        if self.session.config.logging.weights_interval_steps:
            self._record_weights(stage, rows, weights_n, alignment_n)

    def _measures_noise(self) -> bool:
        bilevel = self.session.config.bilevel
        if not bilevel.noise_interval_updates or bilevel.estimator == "unroll":
            return False
        return self.session.state.updates % bilevel.noise_interval_updates == 0

    def _noise(self, found: Hypergradient) -> dict[str, float]:
        """The measured agreement and signal-to-noise, where they were measured."""
        if found.halves_2n is None:
            return {}
        agreement, ratio = signal_to_noise_of(self.session, found.halves_2n)
        self._watch.signal_to_noise(ratio)
        return {"alignment_agreement": agreement, "alignment_signal_to_noise": ratio}

    def _evaluate(self, stage: Stage) -> None:
        with phase("evaluation"):
            losses = evaluate(self.session)
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"step {self.session.state.step}: held-out loss {losses}")
        mean = sum(losses.values()) / len(losses)
        words = last_word_figures(self.session)
        perplexities = {name: math.exp(min(loss, 700.0)) for name, loss in losses.items()}
        figures = {"domain_loss": losses, "domain_perplexity": perplexities, **words}
        self._write(stage, "evaluation", loss=mean, **figures)
        step = self.session.state.step
        text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self._progress.note(f"step {step} held-out loss: {text}")

    def _checkpoint(self) -> None:
        if self._weights is not None:
            self._weights.flush()
        self._lap()
        with phase("checkpoint"):
            save_checkpoint(self.session)

    def _save_weighting(self, stage: Stage) -> None:
        policy = self.session.policy
        if self.session.runtime.is_main and isinstance(policy, LearningPolicy):
            policy.save(self.session.run_dir / "weighting" / f"stage_{stage.number}")

    def _is_last_of_its_number(self, stage: Stage) -> bool:
        later = [other for other in self.session.stages if other.first_step >= stage.end_step]
        return all(other.number != stage.number for other in later)

    def _record_weights(
        self, stage: Stage, rows: Rows, weights_n: Tensor, alignment_n: Tensor | None
    ) -> None:
        """Keep the weights of a global batch (main process only)."""
        if self._weights is not None:
            step, whole = self.session.state.step, rows(slice(0, self.session.global_batch_size))
            self._weights.add(step, stage.number, whole, weights_n, alignment_n)

    def _write(self, stage: Stage, phase: str, **values: object) -> None:
        if self._metrics is None:
            return
        self._lap()
        state = self.session.state
        line = {"step": state.step, "stage": stage.number, "phase": phase, **values}
        counts = {
            "tokens": state.tokens,
            "flops": self.session.compute.spent(state),
            "seconds": round(state.seconds, 3),
        }
        self._metrics.write({**line, **counts})

    def _lap(self) -> None:
        """Add the time since the last lap to the run's."""
        now_s = time.monotonic()
        self.session.state.seconds += now_s - self._clock_s
        self._clock_s = now_s

    def _close(self) -> None:
        self._window.close()
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
