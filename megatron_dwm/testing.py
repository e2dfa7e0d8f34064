"""A small LLM with its optimizer, random batches and plain steps, in a job that is already up.

For tests, the doctor, benchmarks and examples. Everything is the same under every layout: the
initial parameters do not depend on it, and `random_batch` gives each replica its rows of one global
batch.

    with bring_up(ParallelConfig(), seed=1) as runtime:
        learner = tiny_learner(runtime)
        batch = random_batch(0, runtime, rows=8)
        loss = plain_step(learner.llm, learner.optimizer, batch, learner.micro_batch_size)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from megatron_dwm.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import (
    LLM,
    PassResult,
    clear_gradients,
    forward_backward,
    resolve_shape,
)
from megatron_dwm.model.passes.micro_batch import MicroBatch, as_layers_take, attention_borders
from megatron_dwm.model.passes.objective import token_mean, weighted, weighted_denominator
from megatron_dwm.runtime import Runtime
from megatron_dwm.training import Learner, build_learner

VOCAB_SIZE = 256
SEQUENCE_LENGTH = 16
TINY_MODEL = ModelConfig(
    precision="fp32",
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    num_layers=2,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    tied_embeddings=True,
)
"""a model of 0.03 M parameters, small enough for a test and large enough for tensor size 2"""
TINY_TRAINING = TrainingConfig(
    steps=20,
    global_batch_size=8,
    micro_batch_size=2,
    learning_rate=3e-3,
    warmup_fraction=0.1,
)


def tiny_learner(
    runtime: Runtime,
    *,
    parallel: ParallelConfig | None = None,
    training: TrainingConfig = TINY_TRAINING,
    sequence_length: int = SEQUENCE_LENGTH,
    seed: int = 5,
    **changes: Any,
) -> Learner:
    """Build a learner of TINY_MODEL with `changes` to its keys, such as precision="bf16".

    A collective call.

    parallel: the configuration that `runtime` was brought up with; None takes its tensor,
        context and pipeline sizes and the defaults for the rest.
    """
    if parallel is None:
        parallel = ParallelConfig(
            tensor=runtime.tensor_size,
            context=runtime.context_size,
            pipeline=runtime.pipeline_size,
        )
    model = replace(TINY_MODEL, **changes)
    return build_learner(
        resolve_shape(model),
        model,
        parallel,
        training,
        runtime,
        sequence_length=sequence_length,
        seed=seed,
    )


def replica_rows(runtime: Runtime, rows: int) -> slice:
    """Returns which of a global batch's `rows` this data-parallel replica holds."""
    assert rows % runtime.data_size == 0, (rows, runtime.data_size)
    share = rows // runtime.data_size
    return slice(runtime.data_rank * share, (runtime.data_rank + 1) * share)


def random_batch(
    number: int,
    runtime: Runtime,
    *,
    rows: int,
    sequence_length: int = SEQUENCE_LENGTH,
    vocab_size: int = VOCAB_SIZE,
    uncounted: float = 0.0,
) -> Batch:
    """Returns this replica's rows of global batch `number` of random tokens, on its device.

    rows: of the global batch.
    uncounted: fraction of the labels, chosen at random, whose loss does not count.
    """
    generator = torch.Generator().manual_seed(number)
    text = torch.randint(vocab_size, (rows, sequence_length + 1), generator=generator)
    loss_mask_BS = torch.ones(rows, sequence_length)
    if uncounted:
        loss_mask_BS = (torch.rand(rows, sequence_length, generator=generator) > uncounted).float()
    whole = Batch(
        tokens_BS=text[:, :-1].contiguous(),
        labels_BS=text[:, 1:].contiguous(),
        loss_mask_BS=loss_mask_BS,
        position_ids_BS=torch.arange(sequence_length).repeat(rows, 1),
        sample_ids_B=torch.arange(rows),
        document_ids_U=torch.arange(rows),
        domains=("random",) * rows,
    )
    mine = replica_rows(runtime, rows)
    return whole.rows(mine.start, mine.stop).to(runtime.device)


def weighted_gradient(
    llm: LLM, optimizer: ChainedOptimizer, batch: Batch, weights_n: Tensor, micro_batch_size: int
) -> PassResult:
    """Write the weighted gradient of `batch` into the gradient buffers; returns its losses."""
    clear_gradients(llm, optimizer)
    micro_batches = weighted(batch, weights_n, micro_batch_size)
    return forward_backward(llm, micro_batches, denominator=weighted_denominator(batch))


def plain_step(llm: LLM, optimizer: ChainedOptimizer, batch: Batch, micro_batch_size: int) -> float:
    """Take one step of plain Megatron-Core; returns the mean token loss of the global batch.

    Only the model is ours, and the form in which it takes rows and borders: the rest is in the
    order of Megatron-LM's training.py and pretrain_gpt.py. The loss is (sum, integer token count,
    report), finalize_model_grads divides by the total count, and the reports are averaged over the
    data-parallel group. The caller steps the learning rate. Ranks that compute no
    loss return 0.
    """
    llm.transformer.finalize_model_grads_func = finalize_model_grads
    for chunk in llm.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    micro_batches = as_layers_take(llm, token_mean(batch, micro_batch_size))
    num_rows, part_length = micro_batches[0].tokens_BS.shape
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, llm),
        data_iterator=[iter(micro_batches) for _ in llm.chunks],
        model=llm.chunks,
        num_microbatches=len(micro_batches),
        seq_length=part_length * llm.runtime.context_size,
        micro_batch_size=num_rows,
        forward_only=False,
    )
    optimizer.step()
    if not reports:
        return 0.0
    loss_and_count = torch.vstack(reports).sum(dim=0)
    dist.all_reduce(loss_and_count, group=llm.runtime.data_context_group)
    return float(loss_and_count[0] / loss_and_count[1])


_LossOutput = tuple[Tensor, Tensor, Tensor]


def _forward_step(
    llm: LLM, iterator: Iterator[MicroBatch], chunk: Module
) -> tuple[Tensor, partial[_LossOutput]]:
    batch = next(iterator)
    losses_BS = chunk(
        batch.tokens_BS,
        batch.position_ids_BS,
        None,
        labels=batch.labels_BS,
        packed_seq_params=attention_borders(llm, batch),
    )
    return losses_BS, partial(_loss, batch.loss_mask_BS)


def _loss(loss_mask_BS: Tensor, losses_BS: Tensor) -> _LossOutput:
    mask = loss_mask_BS.view(-1)
    loss = torch.sum(losses_BS.view(-1).float() * mask)
    count = mask.sum().detach().to(torch.int)
    return loss, count, torch.stack([loss.detach(), count.float()])
