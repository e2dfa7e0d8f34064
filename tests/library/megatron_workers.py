"""What the ranks of the tests of MegatronProbe run: a loop that is not ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from megatron_dwm import MegatronProbe
from megatron_dwm.bilevel import ESTIMATORS, Problem, frozen_alignments
from megatron_dwm.data import Batch
from megatron_dwm.model.passes.micro_batch import MicroBatch, as_layers_take, attention_borders
from megatron_dwm.model.passes.objective import token_mean
from megatron_dwm.testing import random_batch
from tests.tiny import MICRO_BATCH, SAMPLES, Tiny, tiny

TRAIN, VALIDATION = 100, 101
Loss = Callable[[Tensor], tuple[Tensor, ...]]


def probed(**layout: Any) -> dict[str, Tensor]:
    """Returns MegatronProbe's alignments of this rank's samples, times n, and the product's.

    Also whether the weighted gradient of a probed pass is the plain one, bit for bit.
    """
    with tiny(**layout) as subject:
        llm, optimizer = subject.llm, subject.optimizer
        batches = {number: _batch(subject, number) for number in (TRAIN, VALIDATION)}
        train, validate = (_pass(subject, batches[number]) for number in (TRAIN, VALIDATION))
        problem = Problem(
            llm=llm,
            optimizer=optimizer,
            train_batch=batches[TRAIN],
            weights_n=torch.ones_like(subject.weights_n),
            val_batch=batches[VALIDATION],
            micro_batch_size=MICRO_BATCH,
        )
        expected = {
            "ahead": frozen_alignments(problem).alignment_n,
            "exact": ESTIMATORS["tangent_probe"](problem).alignment_n,
        }
        llm.transformer.finalize_model_grads_func = finalize_model_grads
        probe = MegatronProbe(llm.chunks, optimizer, micro_batch_size=MICRO_BATCH)
        count = len(batches[TRAIN].tokens_BS) // MICRO_BATCH
        exact = probe.exact(train, validate, num_micro_batches=count)
        _clear(subject)
        train()
        plain = [parameter.main_grad.clone() for parameter in llm.parameters()]
        probe.aim(validate)
        with probe.attached(count) as alignments:
            train()
        same = [torch.equal(p.main_grad, g) for p, g in zip(llm.parameters(), plain, strict=True)]
        found = {"ahead": SAMPLES * alignments.values_n, "exact": SAMPLES * exact.values_n}
        return {
            "gradient is the same": torch.tensor(all(same)),
            **{f"{name} found": _gathered(subject, value) for name, value in found.items()},
            **{f"{name} expected": _gathered(subject, value) for name, value in expected.items()},
        }


def refusal_of_rates(**layout: Any) -> list[str]:
    """Returns the messages for one parameter group, on one rank, with another learning rate."""
    with tiny(**layout) as subject:
        subject.llm.transformer.finalize_model_grads_func = finalize_model_grads
        probe = MegatronProbe(subject.llm.chunks, subject.optimizer, micro_batch_size=MICRO_BATCH)
        validate, messages = _pass(subject, _batch(subject, VALIDATION)), []
        if subject.runtime.world_size == 1 or dist.get_rank() == 1:
            subject.optimizer.param_groups[0]["lr"] *= 10
        for call in (probe.aim, lambda run: probe.exact(run, run, num_micro_batches=1)):
            try:
                call(validate)
            except NotImplementedError as error:
                messages.append(str(error))
        return messages


def refusal(micro_batches: int, size: int) -> str:
    """Returns the message of a pass of 4 micro-batches of 2, of which the probe was told other."""
    with tiny() as subject:
        subject.llm.transformer.finalize_model_grads_func = finalize_model_grads
        probe = MegatronProbe(subject.llm.chunks, subject.optimizer, micro_batch_size=size)
        run = _pass(subject, _batch(subject, TRAIN))
        probe.aim(run)
        try:
            with probe.attached(micro_batches):
                run()
        except RuntimeError as error:
            return str(error)
        return ""


def mean_loss(*, average_in_collective: bool) -> tuple[float, float]:
    """Returns the sum of all ranks' alignments, and <z, g> of the gradients, for a mean loss."""
    with tiny() as subject:
        config = subject.llm.transformer
        config.finalize_model_grads_func = finalize_model_grads
        config.calculate_per_token_loss = False
        of_wrapper = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, average_in_collective=average_in_collective
        )
        [chunk] = subject.llm.chunks
        wrapped = DistributedDataParallel(config, of_wrapper, chunk.module)
        subject.llm.chunks[:] = [wrapped]
        optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-3), [wrapped], use_gloo_process_groups=False
        )
        subject = replace(subject, optimizer=optimizer)
        train = _pass(subject, _batch(subject, TRAIN), _mean_loss)
        _clear(subject)
        train()
        optimizer.step()
        probe = MegatronProbe([wrapped], optimizer, micro_batch_size=MICRO_BATCH)
        probe.aim(_pass(subject, _batch(subject, VALIDATION), _mean_loss))
        count = len(_batch(subject, TRAIN).tokens_BS) // MICRO_BATCH
        with probe.attached(count) as alignments:
            train()
        parameters = list(wrapped.module.parameters())
        along = sum(float((probe._z[id(p)] * p.main_grad).double().sum()) for p in parameters)
        return float(_gathered(subject, alignments.values_n).double().sum()), along


def batch_without_tokens() -> Tensor:
    """Returns the alignments of a batch in which no token counts."""
    with tiny() as subject:
        subject.llm.transformer.finalize_model_grads_func = finalize_model_grads
        probe = MegatronProbe(subject.llm.chunks, subject.optimizer, micro_batch_size=MICRO_BATCH)
        probe.aim(_pass(subject, _batch(subject, VALIDATION)))
        with probe.attached(SAMPLES // MICRO_BATCH) as alignments:
            _pass(subject, _batch(subject, TRAIN), _no_loss)()
        return alignments.values_n


def _batch(subject: Tiny, number: int) -> Batch:
    return random_batch(number, subject.runtime, rows=SAMPLES)


def _clear(subject: Tiny) -> None:
    for chunk in subject.llm.chunks:
        chunk.zero_grad_buffer()
    subject.optimizer.zero_grad()


def _pass(subject: Tiny, batch: Batch, loss: Loss | None = None) -> Callable[[], object]:
    """Returns forward and backward of a batch, as Megatron-LM calls the schedule."""
    llm = subject.llm
    micro_batches = as_layers_take(llm, token_mean(batch, MICRO_BATCH))

    def run() -> object:
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, subject, loss or _loss),
            data_iterator=[iter(micro_batches) for _ in llm.chunks],
            model=llm.chunks,
            num_microbatches=len(micro_batches),
            seq_length=batch.tokens_BS.shape[1],
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )

    return run


def _forward_step(
    subject: Tiny, loss: Loss, iterator: Iterator[MicroBatch], chunk: Module
) -> tuple[Tensor, Loss]:
    part = next(iterator)
    losses_BS = chunk(
        part.tokens_BS,
        part.position_ids_BS,
        None,
        labels=part.labels_BS,
        packed_seq_params=attention_borders(subject.llm, part),
    )
    return losses_BS, loss


def _loss(losses_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = losses_BS.float().sum()
    return loss, torch.tensor(losses_BS.numel(), dtype=torch.int), loss.detach()


def _mean_loss(losses_BS: Tensor) -> tuple[Tensor, Tensor]:
    loss = losses_BS.float().mean()
    return loss, loss.detach()


def _no_loss(losses_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = 0.0 * losses_BS.float().sum()
    return loss, torch.tensor(0, dtype=torch.int), loss.detach()


def _gathered(subject: Tiny, values_n: Tensor) -> Tensor:
    parts = [torch.empty_like(values_n) for _ in range(subject.runtime.data_size)]
    dist.all_gather(parts, values_n.contiguous(), group=subject.runtime.data_group)
    return torch.cat(parts)


def started_reductions() -> list[int]:
    """Reductions that the schedule starts, in a plain pass and inside `exact`, by its own call."""
    with tiny(pipeline=2) as subject:
        config = subject.llm.transformer
        config.finalize_model_grads_func = finalize_model_grads
        probe = MegatronProbe(subject.llm.chunks, subject.optimizer, micro_batch_size=MICRO_BATCH)
        calls: list[int] = []
        config.grad_sync_func = lambda _: calls.append(len(calls))
        train = _pass(subject, _batch(subject, TRAIN))
        counts, count = [], SAMPLES // MICRO_BATCH

        def counted() -> object:
            before = len(calls)
            found = train()
            counts.append(len(calls) - before)
            return found

        probe.exact(counted, _pass(subject, _batch(subject, VALIDATION)), num_micro_batches=count)
        assert config.grad_sync_func is not None
        return counts


def left_by_a_failed_validation(**layout: int) -> tuple[bool, str]:
    """Whether parameters are as they were after `exact` failed; and the refusal of a frozen one.

    The frozen one is on the first rank alone.
    """
    with tiny(**layout) as subject:
        subject.llm.transformer.finalize_model_grads_func = finalize_model_grads
        probe = MegatronProbe(subject.llm.chunks, subject.optimizer, micro_batch_size=MICRO_BATCH)
        before = [parameter.detach().clone() for parameter in subject.llm.parameters()]

        def validate() -> object:
            raise StopIteration

        with suppress(StopIteration):
            probe.exact(_pass(subject, _batch(subject, TRAIN)), validate, num_micro_batches=4)
        parameters = subject.llm.parameters()
        same = all(torch.equal(p, kept) for p, kept in zip(parameters, before, strict=True))
        parameters[0].requires_grad_(subject.llm.runtime.rank > 0)
        try:
            MegatronProbe(subject.llm.chunks, subject.optimizer, micro_batch_size=MICRO_BATCH)
        except ValueError as error:
            return same, str(error)
        return same, ""
