"""The training loop (DESIGN: stages, each begun by its weighting updates).

for stage in stages:
    for _ in range(stage.num_updates):                 # LLM frozen
        weighting update from one exact hypergradient
    for step in stage:                                 # weighting model frozen
        weights_n = policy.weights(batch)
        train_step(batch, weights_n)
"""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.bilevel import Hypergradient
from megatron_dwm.data.batch import Batch
from megatron_dwm.training.checkpoint import save_checkpoint
from megatron_dwm.training.progress import Progress
from megatron_dwm.training.records import MetricsWriter, WeightRecorder, weight_statistics
from megatron_dwm.training.session import Session
from megatron_dwm.training.stages import Stage
from megatron_dwm.training.step import (
    StepResult,
    UpdateResult,
    evaluate,
    train_step,
    weighting_update,
)
from megatron_dwm.training.trust import Watch, signal_to_noise
from megatron_dwm.weighting import DwmPolicy


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
        self._clock_s = time.monotonic()

    def run(self) -> None:
        """Train from where the state stands to the last step (collective)."""
        state = self.session.state
        self._warn_if_nothing_is_learned()
        for stage in self.session.stages:
            if stage.end_step <= state.step:
                continue
            self._update_weighting(stage)
            while state.step < stage.end_step:
                self._train(stage)
            if isinstance(self.session.policy, DwmPolicy) and self._is_last_of_its_number(stage):
                self._save_weighting(stage)
        self._close()

    def _warn_if_nothing_is_learned(self) -> None:
        config = self.session.config
        learns = config.policy.name == "dwm" and not config.weighting.frozen
        if learns and not any(stage.num_updates for stage in self.session.stages):
            self._progress.warn(
                f"policy dwm makes no weighting update in {config.training.steps} steps: lower "
                "weighting.warmup_steps or train longer"
            )

    def _update_weighting(self, stage: Stage) -> None:
        session, state = self.session, self.session.state
        while state.step == stage.first_step and state.stage_updates < stage.num_updates:
            assert session.weighting_data is not None
            train = session.training_batch(session.weighting_data, state.updates)
            val = session.validation_batch(state.updates)
            result = weighting_update(session, train, val, measure_noise=self._measures_noise())
            state.updates += 1
            state.stage_updates += 1
            self._report_update(stage, result)

    def _train(self, stage: Stage) -> None:
        session, state = self.session, self.session.state
        batch = session.training_batch(session.data, state.step)
        weights_n = session.policy.weights(batch)
        result = train_step(session, batch, weights_n)
        state.step += 1
        state.stage_updates = 0
        state.tokens += session.tokens_per_step
        self._report_step(stage, batch, weights_n, result)
        last = state.step == session.config.training.steps
        if session.evaluation and (
            last or state.step % session.config.evaluation.interval_steps == 0
        ):
            self._evaluate(stage)
        interval = session.config.training.checkpoint_interval_steps
        if last or (interval and state.step % interval == 0):
            self._checkpoint()

    def _report_step(
        self, stage: Stage, batch: Batch, weights_n: Tensor, result: StepResult
    ) -> None:
        session, state = self.session, self.session.state
        whole_n = self._gather(weights_n)
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
            self._record_weights(stage, session.data, state.step - 1, whole_n, None)

    def _report_update(self, stage: Stage, result: UpdateResult) -> None:
        state, found = self.session.state, result.hypergradient
        weights_n = self._gather(result.update.weights_n)
        alignment_n = self._gather(found.alignment_n)
        if not math.isfinite(found.val_loss) or not bool(torch.isfinite(alignment_n).all()):
            raise FloatingPointError(
                f"weighting update {state.updates}: validation loss {found.val_loss}, "
                f"gradient norm {found.grad_norm}"
            )
        self._write(
            stage,
            "weighting",
            update=state.updates,
            loss=found.train_loss,
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
            data = self.session.weighting_data
            self._record_weights(stage, data, state.updates - 1, weights_n, alignment_n)

    def _measures_noise(self) -> bool:
        bilevel = self.session.config.bilevel
        if not bilevel.noise_interval_updates or bilevel.estimator == "unroll":
            return False
        return self.session.state.updates % bilevel.noise_interval_updates == 0

    def _noise(self, found: Hypergradient) -> dict[str, float]:
        """The measured agreement and signal-to-noise, where they were measured."""
        if found.halves_2n is None:
            return {}
        agreement, ratio = signal_to_noise(*(self._gather(half_n) for half_n in found.halves_2n))
        self._watch.signal_to_noise(ratio)
        return {"alignment_agreement": agreement, "alignment_signal_to_noise": ratio}

    def _evaluate(self, stage: Stage) -> None:
        losses = evaluate(self.session)
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"step {self.session.state.step}: held-out loss {losses}")
        mean = sum(losses.values()) / len(losses)
        self._write(stage, "evaluation", loss=mean, domain_loss=losses)
        step = self.session.state.step
        text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        self._progress.note(f"step {step} held-out loss: {text}")

    def _checkpoint(self) -> None:
        if self._weights is not None:
            self._weights.flush()
        self._lap()
        save_checkpoint(self.session)

    def _save_weighting(self, stage: Stage) -> None:
        policy = self.session.policy
        assert isinstance(policy, DwmPolicy)
        if self.session.runtime.is_main:
            policy.model.save(self.session.run_dir / "weighting" / f"stage_{stage.number}")

    def _is_last_of_its_number(self, stage: Stage) -> bool:
        later = [other for other in self.session.stages if other.first_step >= stage.end_step]
        return all(other.number != stage.number for other in later)

    def _record_weights(
        self, stage: Stage, data: object, number: int, weights_n: Tensor, alignment_n: Tensor | None
    ) -> None:
        """Keep the weights of global batch `number` of `data` (main process only)."""
        if self._weights is None:
            return
        session = self.session
        batch = data.batch(data.ids_of_step(number, session.global_batch_size))
        self._weights.add(session.state.step, stage.number, batch, weights_n, alignment_n)

    def _gather(self, values_n: Tensor) -> Tensor:
        """Values of every replica's samples, in the order of the global batch."""
        runtime = self.session.runtime
        if runtime.data_size == 1:
            return values_n
        whole = values_n.new_empty(len(values_n) * runtime.data_size)
        dist.all_gather_into_tensor(whole, values_n.contiguous(), group=runtime.data_group)
        return whole

    def _write(self, stage: Stage, phase: str, **values: object) -> None:
        if self._metrics is None:
            return
        self._lap()
        state = self.session.state
        line = {"step": state.step, "stage": stage.number, "phase": phase, **values}
        self._metrics.write({**line, "tokens": state.tokens, "seconds": round(state.seconds, 3)})

    def _lap(self) -> None:
        """Add the time since the last lap to the run's."""
        now_s = time.monotonic()
        self.session.state.seconds += now_s - self._clock_s
        self._clock_s = now_s

    def _close(self) -> None:
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
