"""What the ranks of the tests of OPUS run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, Problem
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config, PolicyConfig, WeightingConfig
from megatron_dwm.data import Batch
from megatron_dwm.training.pool import choose_rows
from megatron_dwm.training.pool_alignments import align_pool
from megatron_dwm.weighting.groups import gather_over_data
from megatron_dwm.weighting.opus import Opus
from megatron_dwm.weighting.pool import PoolAlignments
from tests.bilevel.workers import TRAIN, VALIDATION, _losses, _moments_by_name
from tests.subjects import learner_of
from tests.tiny import MICRO_BATCH, SAMPLES, SEQUENCE_LENGTH, tiny

KEPT = SAMPLES // 2


def _request(**options: Any) -> PoolAlignments:
    return PoolAlignments(**options)


def scores(options: dict[str, Any], **layout: Any) -> Tensor:
    """Returns the scores of the global pool, in order, on every rank."""
    with tiny(**layout) as subject:
        pool, passages = subject.batch(TRAIN), subject.batch(VALIDATION)
        before = [p.detach().clone() for p in subject.llm.parameters()]
        learner = learner_of(subject, MICRO_BATCH)
        found = align_pool(learner, pool, passages, _request(**options))
        after = subject.llm.parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return gather_over_data(found, subject.runtime)


def exact_and_hypergradient(**layout: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Scores with the exact Jacobian, the alignments of the pool as a batch, and the choice."""
    with tiny(**layout) as subject:
        pool, passages = subject.batch(TRAIN), subject.batch(VALIDATION)
        problem = Problem(
            llm=subject.llm,
            optimizer=subject.optimizer,
            train_batch=pool,
            weights_n=torch.ones(pool.size),
            val_batch=passages,
            micro_batch_size=MICRO_BATCH,
        )
        expected = ESTIMATORS["tangent_probe"](problem).alignment_n
        method = _method(jacobian="exact", redundancy=0.0, selection_temperature=0.0)
        learner, state = learner_of(subject, MICRO_BATCH), TrainState(step=7)
        request = method.pool_alignments(state)
        assert request is not None
        found = align_pool(learner, pool, passages, request)
        rows = choose_rows(learner, method, pool, passages, state, count=KEPT)
        runtime = subject.runtime
        return gather_over_data(found, runtime), gather_over_data(expected, runtime), rows


def choice(step: int, options: dict[str, Any], **layout: Any) -> list[int]:
    """Returns the rows that a step draws, on every rank."""
    with tiny(**layout) as subject:
        learner, method = learner_of(subject, MICRO_BATCH), _method(**options)
        pool, passages = subject.batch(TRAIN), subject.batch(VALIDATION)
        return choose_rows(learner, method, pool, passages, TrainState(step=step), count=KEPT)


def _method(**policy: Any) -> Opus:
    policy = {"alignment_warmup": 1, **policy}
    return Opus(
        Config(
            policy=PolicyConfig(name="opus", **policy), weighting=WeightingConfig(pool_batches=2)
        )
    )


def frozen_by_hand(tokens: int | None = None, **model: Any) -> dict[str, Tensor]:
    """Alignments and overlaps by autograd in double precision, J_0 by its formula."""
    with tiny(**model) as subject:
        module, moments = subject.llm.modules[0], _moments_by_name(subject)
        rate = subject.optimizer.param_groups[0]["lr"]
        theta = {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}
        pool, passages = _cut(subject.batch(TRAIN), tokens), subject.batch(VALIDATION)
        counts = passages.loss_mask_BS.sum(dim=1)
        val_loss = (_losses(module, theta, passages) * counts).sum() / counts.sum()
        target = torch.autograd.grad(val_loss, list(theta.values()))
        rows = [
            torch.autograd.grad(
                _losses(module, theta, pool.rows(i, i + 1))[0], list(theta.values())
            )
            for i in range(pool.size)
        ]
        alignments, columns = torch.zeros(pool.size, dtype=torch.float64), []
        for number, name in enumerate(theta):
            _, second, step, group = moments[name]
            b1, b2 = group["betas"]
            root = (second.double() / (1 - b2**step)).sqrt()
            jacobian = (1 - b1) / (1 - b1 ** (step + 1)) / (root + group["eps"])
            jacobian = jacobian * (root > 0)
            steps = torch.stack([(jacobian * row[number]).flatten() for row in rows])
            alignments += steps @ target[number].flatten()
            columns.append(steps)
        updates = torch.cat(columns, dim=1)
        return {"alignments": alignments, "overlaps": rate * updates @ updates.t()}


def _cut(batch: Batch, tokens: int | None) -> Batch:
    """The first tokens of every row, with the rest of the labels not counted."""
    if tokens is None:
        return batch
    mask_BS = batch.loss_mask_BS * (torch.arange(SEQUENCE_LENGTH) < tokens)
    return replace(batch, loss_mask_BS=mask_BS)
