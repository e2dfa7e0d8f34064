"""Plain Megatron-Core training and the product's own step, to compare; weights as numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.data import Batch
from megatron_dwm.model import clear_gradients, forward_backward
from megatron_dwm.model.passes.objective import weighted, weighted_denominator
from megatron_dwm.testing import plain_step
from megatron_dwm.weighting.uniform import Uniform
from tests.documents import packed_batch
from tests.subjects import with_method
from tests.tiny import MICRO_BATCH, Tiny, tiny

STEPS = 6


def _full(batch: Batch) -> Batch:
    """The batch with every token counted, as in pretraining."""
    return Batch(
        **{
            **{name: getattr(batch, name) for name in batch.__dataclass_fields__},
            "loss_mask_BS": torch.ones_like(batch.loss_mask_BS),
        }
    )


def _batch(subject: Tiny, number: int, documents: dict[str, Any] | None) -> Batch:
    """A batch of rows, or of documents if there are options of `packed_batch`."""
    if documents is None:
        return _full(subject.batch(number))
    return packed_batch(number, subject.runtime, **documents)


def plain_megatron(
    documents: dict[str, Any] | None = None, **layout: Any
) -> tuple[list[float], Tensor]:
    """(losses, parameters): Megatron-LM's loop, per-token loss, its integer token count."""
    with tiny(steps=0, **layout) as subject:
        losses = []
        for number in range(STEPS):
            batch = _batch(subject, number, documents)
            losses.append(plain_step(subject.llm, subject.optimizer, batch, MICRO_BATCH))
            subject.scheduler.step(increment=1)
        return losses, _flat(subject)


def ours_uniform(
    documents: dict[str, Any] | None = None, **layout: Any
) -> tuple[list[float], Tensor]:
    """(losses, parameters) of the product's own step with uniform weights, on the same batches."""
    with tiny(steps=0, **layout) as subject:
        ours = with_method(subject, Uniform(), MICRO_BATCH)
        batches = (_batch(subject, number, documents) for number in range(STEPS))
        losses = [ours.taken(batch).loss for batch in batches]
        return losses, _flat(subject)


def _flat(subject: Tiny) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in subject.llm.parameters()])


def gradient_of_weights(weights: list[float], **layout: Any) -> Tensor:
    """The gradient of one batch under the given global weights, flat, in fp32."""
    with tiny(steps=2, **layout) as subject:
        share = len(weights) // subject.runtime.data_size
        first = subject.runtime.data_rank * share
        subject.weights_n = torch.tensor(weights[first : first + share])
        subject.gradient(50)
        return torch.cat([p.main_grad.flatten() for p in subject.llm.parameters()])


def gradient_without(dropped: list[int]) -> Tensor:
    """(1/n) times the gradient of the sum of the other samples' token-mean losses, by autograd."""
    with tiny(steps=2) as subject:
        module, batch = subject.llm.modules[0], subject.batch(50)
        total = torch.zeros([])
        for i in range(batch.size):
            if i not in dropped:
                row = batch.rows(i, i + 1)
                losses = module(row.tokens_BS, row.position_ids_BS, None, labels=row.labels_BS)
                total = total + (losses * row.loss_mask_BS).sum() / row.loss_mask_BS.sum()
        names = list(module.parameters())
        gradients = torch.autograd.grad(total / batch.size, names)
        return torch.cat([g.flatten() for g in gradients])


def loss_is_finite_everywhere() -> bool:
    """Losses reach every rank of a replica, not only the last stage."""
    with tiny(pipeline=2, steps=0) as subject:
        batch = subject.batch(1)
        passes = weighted(batch, subject.weights_n, MICRO_BATCH)
        clear_gradients(subject.llm, subject.optimizer)
        result = forward_backward(subject.llm, passes, denominator=weighted_denominator(batch))
        other = result.unit_losses_n.clone()
        dist.all_reduce(other, group=subject.runtime.inner_group)
        return torch.allclose(other, 2 * result.unit_losses_n)
