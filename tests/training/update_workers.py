"""What the ranks of the tests of updates inside a step run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_dwm.bilevel import Hypergradient
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.data import Batch
from megatron_dwm.training import Ahead, UpperLevel, weighting_update
from megatron_dwm.training import update as training_update
from megatron_dwm.weighting.method import WeightingUpdate
from megatron_dwm.weighting.uniform import Uniform
from tests.subjects import with_method
from tests.tiny import MICRO_BATCH, tiny


class LastHalf(Uniform):
    """All weight is on the last half of a replica's samples; updates give the same weights."""

    def __init__(self) -> None:
        self.updates = 0

    def weights(self, batch: Batch, *_: Any) -> Tensor:
        weights_n = torch.zeros(batch.units.count)
        weights_n[batch.units.count // 2 :] = 2.0
        return weights_n

    def update(self, batch: Batch, *_: Any) -> WeightingUpdate:
        self.updates += 1
        return WeightingUpdate(torch.ones(batch.units.count))


def updates_by_probed_fraction(**layout: Any) -> list[tuple[int, bool]]:
    """Calls of `update`, and whether the step reports one: without known alignments, and with."""
    with tiny(**layout) as subject:
        found = []
        for fraction in (0.5, 1.0):
            method = LastHalf()
            upper = UpperLevel(passages=subject.batch(101), ahead=Ahead(fraction=fraction))
            taken = with_method(subject, method, MICRO_BATCH).taken(subject.batch(100), upper)
            found.append((method.updates, taken.update is not None))
        return found


def update_of_a_skipped_step(**layout: Any) -> tuple[int, bool, bool, bool]:
    """Calls of `update`; whether the step was taken; whether it tells of the update; what changed.

    A gradient of an unprobed micro-batch is infinite, on the first rank alone, so loss and
    alignments are finite.
    """
    with tiny(**layout) as subject:
        method = LastHalf()
        upper = UpperLevel(passages=subject.batch(101), ahead=Ahead(fraction=1.0))
        # Megatron-Core's buffers begin with the last one, so it is in the first rank's shard.
        *_, parameter = subject.llm.parameters()
        upstream, passes = method.update, []
        state = [*subject.llm.parameters(), *_moments(subject.optimizer)]
        before = [each.detach().clone() for each in state]

        def update(*given: Any) -> WeightingUpdate:
            passes.append(None)
            if subject.runtime.rank == 0:
                parameter.main_grad.view(-1)[0] = float("inf")
            return upstream(*given)

        method.update = update  # type: ignore[method-assign]
        outcome = with_method(subject, method, MICRO_BATCH).step(subject.batch(100), upper)
        same = all(torch.equal(now, then) for now, then in zip(state, before, strict=True))
        return len(passes), hasattr(outcome, "weighted_loss"), outcome.update is not None, same


def update_where_one_rank_is_not_finite() -> tuple[int, bool]:
    """Calls of `update`, and whether there is a result; the last rank's passages have a NaN."""
    with tiny() as subject:
        method, passages = LastHalf(), subject.batch(101)
        if subject.runtime.rank == subject.runtime.world_size - 1:
            mask_BS = passages.loss_mask_BS.clone()
            mask_BS[0, 0] = float("nan")
            passages = replace(passages, loss_mask_BS=mask_BS)
        upper = UpperLevel(passages=passages)
        learner = with_method(subject, method, MICRO_BATCH).learner
        found = weighting_update(learner, method, subject.batch(100), upper, TrainState())
        return method.updates, found is not None


def finite_alignments_of_all(broken: int) -> bool:
    """What a rank finds of alignments, of which only those of rank `broken` have a NaN."""
    with tiny() as subject:
        alignment_n = torch.ones(4)
        if subject.runtime.rank == broken:
            alignment_n[2] = float("nan")
        return training_update._is_finite_everywhere(
            Hypergradient(alignment_n=alignment_n, val_loss=1.0, grad_norm=None)
        )


def _moments(optimizer: ChainedOptimizer) -> list[Tensor]:
    states = [one for each in optimizer.chained_optimizers for one in each.optimizer.state.values()]
    found = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    assert found
    return found
