"""The three things that a run does: an LLM step, a weighting update, an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, Hypergradient, Problem
from megatron_dwm.data.batch import Batch
from megatron_dwm.model import clear_gradients, forward_backward, forward_only
from megatron_dwm.model.objective import token_mean, weighted, weighted_denominator
from megatron_dwm.training.session import Session
from megatron_dwm.weighting import DwmPolicy, WeightingUpdate


@dataclass(frozen=True)
class StepResult:
    """One LLM step. loss: mean of the samples' token-mean losses over the global batch."""

    loss: float
    weighted_loss: float
    grad_norm: float
    learning_rate: float


def train_step(session: Session, batch: Batch, weights_n: Tensor) -> StepResult:
    """One optimiser step of the LLM on this replica's `batch` with its weights (collective)."""
    llm, optimizer = session.llm, session.optimizer
    clear_gradients(llm, optimizer)
    micro_batches = weighted(batch, weights_n, session.config.training.micro_batch_size)
    result = forward_backward(llm, micro_batches, denominator=weighted_denominator(batch))
    learning_rate = optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = optimizer.step()
    session.scheduler.step(increment=1)
    losses_n = result.sample_losses_n
    means = _mean_over_samples(session, torch.stack([losses_n, losses_n * weights_n]))
    return StepResult(float(means[0]), float(means[1]), float(grad_norm or 0.0), learning_rate)


@dataclass(frozen=True)
class UpdateResult:
    """One weighting update: what it learned from, and what it did to the weighting model."""

    hypergradient: Hypergradient
    update: WeightingUpdate


def weighting_update(
    session: Session, train: Batch, val: Batch, *, measure_noise: bool
) -> UpdateResult:
    """One update of the weighting model, the LLM frozen (collective).

    measure_noise: also find the alignments of either half of the validation batch.
    """
    policy, config = session.policy, session.config
    assert isinstance(policy, DwmPolicy)
    problem = Problem(
        llm=session.llm,
        optimizer=session.optimizer,
        train_batch=train,
        weights_n=policy.weights(train),
        val_batch=val,
        micro_batch_size=config.training.micro_batch_size,
        inner=config.bilevel.inner_optimizer,
    )
    halves = measure_noise and val.size % 2 == 0
    result = ESTIMATORS[config.bilevel.estimator](problem, halves=halves)
    update = policy.update(train, result.alignment_n, problem.learning_rate)
    return UpdateResult(result, update)


def evaluate(session: Session) -> dict[str, float]:
    """Token-mean loss of every domain of the held-out set (collective)."""
    assert session.evaluation is not None
    domains = session.evaluation.domains
    sums = torch.zeros(2, len(domains), dtype=torch.float64)
    rows = session.local_rows(session.global_batch_size)
    for whole in session.evaluation.batches(session.global_batch_size):
        batch = whole.rows(rows.start, rows.stop).to(session.runtime.device)
        micro_batches = token_mean(batch, session.config.training.micro_batch_size)
        result = forward_only(session.llm, micro_batches)
        where = torch.tensor([_index(domains, name) for name in batch.domains])
        sums[0].index_add_(0, where, result.loss_sums_n.double().cpu())
        sums[1].index_add_(0, where, result.token_counts_n.double().cpu())
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
