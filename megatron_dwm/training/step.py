"""The three things that a run does: an LLM step, a weighting update, an evaluation.

A step and an update begin alike, with a pass that leaves the weighted gradient g(w) in the gradient
buffers. The step hands it to the optimiser; the update finds from it what the weights should have
been (bilevel/). An update on the training batch does both, in this order: g(w) at theta, the
hypergradient through the very step that follows, the step. So theta is the parameters before the
step, the moments are those before the step, and theta' is, bit for bit, the parameters after it;
the new weighting model speaks from the next step on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.bilevel import Hypergradient, Problem, hypergradient
from megatron_dwm.data.batch import Batch
from megatron_dwm.model import (
    ForwardOutputs,
    PassResult,
    clear_gradients,
    forward_backward,
    forward_only,
)
from megatron_dwm.model.passes.objective import unit, weighted, weighted_denominator
from megatron_dwm.model.passes.predictions import predict
from megatron_dwm.runtime.profiling import phase
from megatron_dwm.training.guard import LossSpike, require_sound_weights, step_if_finite
from megatron_dwm.training.session import Session
from megatron_dwm.training.trust import signal_to_noise
from megatron_dwm.weighting import LearningPolicy, WeightingUpdate


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """One weighting update: what it learned from, and what it did to the weighting model.

    train_loss: mean of the samples' token-mean losses over the global batch, at theta.
    """

    hypergradient: Hypergradient
    update: WeightingUpdate
    train_loss: float


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One LLM step.

    loss: mean of the samples' token-mean losses over the global batch.
    weights_n: float32, this replica's weights.  update: the weighting update made inside the step.
    """

    loss: float
    weighted_loss: float
    grad_norm: float
    learning_rate: float
    weights_n: Tensor
    update: UpdateResult | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the step was taken."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a weighting update learns from besides the training batch.

    val: this replica's passages.  measure_noise: also find the alignments of either half of them,
    their even and their odd rows.
    """

    val: Batch
    measure_noise: bool


def train_step(
    session: Session,
    batch: Batch,
    lesson: Lesson | None = None,
    largest_loss: float | None = None,
) -> StepResult:
    """One optimiser step of the LLM on this replica's `batch` (collective).

    lesson: make a weighting update from this step's own gradient; the step itself is the same.
    largest_loss: above it the batch is a spike.

    Nothing is changed but the learning rate's schedule where loss or gradient norm are not finite.
    Raises LossSpike before anything is changed; RunError for weights that are no weights.
    """
    learning_rate = session.optimizer.param_groups[0]["lr"]
    with phase("weighted gradient"):
        result = weighted_pass(session, batch, keep_reading=lesson is not None)
    losses_n, weights_n = result.sample_losses_n, result.weights_n
    wrong_n = ~(torch.isfinite(weights_n) & (weights_n >= 0))
    rows = [losses_n, losses_n * weights_n, weights_n, wrong_n.to(losses_n.dtype)]
    loss, weighted_loss, weight, wrong = _mean_over_samples(session, torch.stack(rows)).tolist()
    if largest_loss is not None and loss > largest_loss:
        raise LossSpike(loss, largest_loss)
    update, grad_norm = None, math.nan
    if math.isfinite(loss):
        require_sound_weights(weight, wrong)
        update = None if lesson is None else _learn(session, batch, result, lesson)
        with phase("optimizer step"):
            grad_norm = step_if_finite(session.optimizer)
    session.scheduler.step(increment=1)
    return StepResult(
        loss=loss,
        weighted_loss=weighted_loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        weights_n=weights_n,
        update=update,
    )


def weighting_update(session: Session, train: Batch, lesson: Lesson) -> UpdateResult | None:
    """One update on a batch of its own, the LLM frozen (collective); None if left out."""
    with phase("weighted gradient"):
        result = weighted_pass(session, train, keep_reading=True)
    update = _learn(session, train, result, lesson)
    clear_gradients(session.llm, session.optimizer)
    return update


def weighted_pass(session: Session, batch: Batch, *, keep_reading: bool) -> PassResult:
    """Leave g(w) in the gradient buffers, with the policy's weights, which come back (collective).
    The state counts whether they took a model.

    keep_reading: keep what an update of the policy reads.
    """
    llm, policy = session.llm, session.policy
    size, layer = session.config.training.micro_batch_size, session.config.weighting.early_layer
    wanted = policy.needs
    session.state.weighings += bool(policy.needs)
    if keep_reading:
        assert isinstance(policy, LearningPolicy)
        wanted = wanted | policy.update_needs
    early_layer = layer if "features" in wanted else None
    weights_n, weigh = torch.ones(batch.size, device=llm.runtime.device), None
    if not policy.needs & {"losses", "features"}:
        weights_n = policy.weights(batch)
    elif policy.whole_batch and batch.size > size:
        # Every weight waits for the last micro-batch, and a pipeline cannot hold all of them back:
        # read first. One forward pass more.
        first = forward_only(llm, unit(batch, size), early_layer=early_layer)
        weights_n = policy.weights(batch, first.outputs)
    else:
        rows = batch.micro_batches(size)

        def weigh(index: int, reading: ForwardOutputs) -> Tensor:
            return policy.weights(rows[index], reading)

    clear_gradients(llm, session.optimizer)
    result = forward_backward(
        llm,
        weighted(batch, weights_n, size),
        denominator=weighted_denominator(batch),
        weigh=weigh,
        early_layer=early_layer if keep_reading or weigh is not None else None,
        keep_features=keep_reading and early_layer is not None,
    )
    return result if weigh is not None else replace(result, weights_n=weights_n)


def _learn(
    session: Session, train: Batch, result: PassResult, lesson: Lesson
) -> UpdateResult | None:
    """One update from g(w), which stands in the gradient buffers before and after.

    None, and nothing is learned, where what it would learn from is not finite.
    """
    policy, bilevel = session.policy, session.config.bilevel
    assert isinstance(policy, LearningPolicy) and result.weights_n is not None
    problem = Problem(
        llm=session.llm,
        optimizer=session.optimizer,
        train_batch=train,
        weights_n=result.weights_n,
        val_batch=lesson.val,
        micro_batch_size=session.config.training.micro_batch_size,
        inner=bilevel.inner_optimizer,
    )
    with phase("hypergradient"):
        found = hypergradient(problem, bilevel.estimator, halves=lesson.measure_noise)
    if not _is_finite_everywhere(session, found):
        return None
    if found.halves_2n is not None:
        policy.trust(signal_to_noise_of(session, found.halves_2n)[1])
    with phase("weighting model"):
        update = policy.update(train, result.outputs, found.alignment_n, problem.learning_rate)
    train_loss = float(_mean_over_samples(session, result.sample_losses_n[None])[0])
    return UpdateResult(hypergradient=found, update=update, train_loss=train_loss)


def _is_finite_everywhere(session: Session, found: Hypergradient) -> bool:
    """Whether every replica's alignments and the validation loss are finite (collective)."""
    finite = torch.isfinite(found.alignment_n).all() & math.isfinite(found.val_loss)
    answer = finite.to(torch.int32)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer)


def signal_to_noise_of(session: Session, halves_2n: Tensor) -> tuple[float, float]:
    """`signal_to_noise` of the global batch (collective)."""
    return signal_to_noise(*(session.gather(half_n) for half_n in halves_2n))


def evaluate(session: Session, between: Callable[[], None]) -> dict[str, float]:
    """Token-mean loss of every domain of the held-out set (collective): the exported model's, which
    has no rows that pad the vocabulary.

    between: called after every batch.
    """
    assert session.evaluation is not None
    domains = session.evaluation.domains
    sums = torch.zeros(2, len(domains), dtype=torch.float64)
    rows = session.local_rows(session.global_batch_size)
    for whole in session.evaluation.batches(session.global_batch_size):
        batch = whole.rows(rows.start, rows.stop).to(session.runtime.device)
        found = predict(session.llm, batch, session.config.training.micro_batch_size)
        losses_n = -(found.log_likelihood_BS * batch.loss_mask_BS).double().sum(dim=1)
        where = torch.tensor([_index(domains, name) for name in batch.domains])
        sums[0].index_add_(0, where, losses_n.cpu())
        sums[1].index_add_(0, where, batch.loss_mask_BS.double().sum(dim=1).cpu())
        between()
    sums = sums.to(session.runtime.device)
    dist.all_reduce(sums, group=session.runtime.data_group)
    return dict(zip(domains, (sums[0] / sums[1]).tolist(), strict=True))


def _index(domains: list[str], name: str) -> int:
    """Padding rows carry no tokens, so any domain will do for them."""
    return domains.index(name) if name in domains else 0


def _mean_over_samples(session: Session, values_Kn: Tensor) -> Tensor:
    """[K]: means over the samples of the global batch."""
    means_K = values_Kn.double().mean(dim=1)
    dist.all_reduce(means_K, group=session.runtime.data_group)
    return means_K / session.runtime.data_size
