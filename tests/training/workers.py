"""Plain Megatron-Core training, written without anything of ours but the model, to compare with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_dwm.data import Batch
from megatron_dwm.model import clear_gradients, forward_backward
from megatron_dwm.model.passes.objective import weighted, weighted_denominator
from tests.tiny import MICRO_BATCH, SEQUENCE_LENGTH, Tiny, tiny

STEPS = 6


def _full(batch: Batch) -> Batch:
    """The batch with every token counted, as in pretraining."""
    return Batch(
        **{
            **{name: getattr(batch, name) for name in batch.__dataclass_fields__},
            "loss_mask_BS": torch.ones_like(batch.loss_mask_BS),
        }
    )


def plain_megatron(**layout: Any) -> tuple[list[float], Tensor]:
    """(losses, parameters): Megatron-LM's loop, per-token loss, its integer token count."""
    with tiny(steps=0, **layout) as subject:
        subject.llm.transformer.finalize_model_grads_func = finalize_model_grads
        losses = [_plain_step(subject, _full(subject.batch(number))) for number in range(STEPS)]
        return losses, _flat(subject)


def _plain_step(subject: Tiny, batch: Batch) -> float:
    def loss_func(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss_mask = loss_mask.view(-1).float()
        loss = torch.sum(output.float().view(-1) * loss_mask)
        tokens = loss_mask.sum().clone().detach().to(torch.int)
        return loss, tokens, loss.clone().detach()

    def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        rows = next(iterator)
        output = model(rows.tokens_BS, rows.position_ids_BS, None, labels=rows.labels_BS)
        return output, partial(loss_func, rows.loss_mask_BS)

    micro_batches = batch.micro_batches(MICRO_BATCH)
    for chunk in subject.llm.chunks:
        chunk.zero_grad_buffer()
    subject.optimizer.zero_grad()
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=subject.llm.chunks,
        num_microbatches=len(micro_batches),
        seq_length=SEQUENCE_LENGTH,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    subject.optimizer.step()
    subject.scheduler.step(increment=1)
    return float(sum(sums)) if sums else 0.0


def ours_uniform(weight: float = 1.0, **layout: Any) -> tuple[list[float], Tensor]:
    """(losses, parameters) of our step with every weight `weight`, on the same batches."""
    with tiny(steps=0, **layout) as subject:
        losses = []
        for number in range(STEPS):
            batch = _full(subject.batch(number))
            weights_n = torch.full((batch.size,), weight)
            clear_gradients(subject.llm, subject.optimizer)
            passes = weighted(batch, weights_n, MICRO_BATCH)
            result = forward_backward(subject.llm, passes, denominator=weighted_denominator(batch))
            subject.optimizer.step()
            subject.scheduler.step(increment=1)
            # Added up as the plain loop adds: micro-batch by micro-batch.
            sums = [rows.flatten().sum() for rows in _token_losses(result, batch)]
            losses.append(float(sum(sums)) if subject.runtime.is_last_stage else 0.0)
        return losses, _flat(subject)


def _token_losses(result: Any, batch: Batch) -> list[Tensor]:
    return list(result.loss_sums_n.split(MICRO_BATCH))


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
        other = result.sample_losses_n.clone()
        dist.all_reduce(other, group=subject.runtime.inner_group)
        return torch.allclose(other, 2 * result.sample_losses_n)
