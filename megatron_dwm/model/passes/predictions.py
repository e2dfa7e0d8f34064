"""Logits and predictions of the LLM through Megatron-Core's pipeline schedules, without gradients.

Training needs token losses only. Evaluation also needs the likeliest token, and its probabilities
must leave out the rows that pad the vocabulary, because an exported model has none. Cost: one
forward pass, three messages of [B, S] floats in the tensor-parallel group, and the logits of one
micro-batch in float32 (this rank's part of the vocabulary) in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from megatron_dwm.model.layers.context import in_order
from megatron_dwm.model.llm import LLM
from megatron_dwm.model.passes.micro_batch import MicroBatch, as_layers_take, attention_borders
from megatron_dwm.model.passes.objective import TokenBatch, token_mean
from megatron_dwm.model.passes.pipeline import without_recomputation
from megatron_dwm.runtime import Runtime

Kept = TypeVar("Kept")

_LARGEST_CHUNK = 1 << 25
"""logits of which the exponentials are in memory at a time"""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The model's predictions for every label of a batch, on every rank of the replica.

    log_likelihood_BS: float32, nats.
    is_likeliest_BS: True if no other token has a larger logit.
    """

    log_likelihood_BS: Tensor
    is_likeliest_BS: Tensor


def predict(llm: LLM, batch: TokenBatch, micro_batch_size: int) -> Predictions:
    """Returns the predictions for every label of this replica's `batch` (collective in it)."""
    starts = range(0, len(batch.tokens_BS), micro_batch_size)
    parts = [batch.rows(start, start + micro_batch_size) for start in starts]
    kept = forward_logits(llm, parts, partial(_score_labels, llm))
    both_2BS = (
        _whole_rows(llm.runtime, torch.cat(kept, dim=1))
        if llm.runtime.is_last_stage
        else torch.empty(2, *batch.tokens_BS.shape, device=llm.runtime.device)
    )
    llm.runtime.broadcast_from_last_stage(both_2BS)
    return Predictions(log_likelihood_BS=both_2BS[0], is_likeliest_BS=both_2BS[1] > 0)


def forward_logits(
    llm: LLM, parts: Sequence[TokenBatch], keep: Callable[[Tensor, Tensor], Kept]
) -> list[Kept]:
    """Returns `keep`'s result for every micro-batch, in order; empty before the last stage.

    keep: called with the labels of a micro-batch, [B, S], and its logits [B, S, V / tensor size] in
        the model's precision, for this tensor rank's rows of the padded vocabulary. Under context
        parallelism both are of this rank's part of every row.
    """
    micro_batches = as_layers_take(llm, [_as_micro_batch(part) for part in parts])
    size, part_length = micro_batches[0].tokens_BS.shape
    with torch.no_grad(), without_recomputation(llm):
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, llm, keep),
            data_iterator=[iter(zip(parts, micro_batches, strict=True)) for _ in llm.chunks],
            model=llm.chunks,
            num_microbatches=len(parts),
            seq_length=part_length * llm.runtime.context_size,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )


def _forward_step(
    llm: LLM,
    keep: Callable[[Tensor, Tensor], Any],
    iterator: Iterator[tuple[TokenBatch, MicroBatch]],
    chunk: Module,
) -> tuple[Tensor, Callable[..., Any]]:
    """Megatron's forward_step_func; without labels the model returns logits."""
    part, batch = next(iterator)
    output = chunk(
        batch.tokens_BS,
        batch.position_ids_BS,
        None,
        packed_seq_params=attention_borders(llm, batch),
    )

    def kept(logits_BSV: Tensor, non_loss_data: bool) -> Any:  # the names are Megatron's
        assert non_loss_data
        rows = len(part.tokens_BS)
        labels_BS = batch.labels_BS.reshape(rows, -1)
        return keep(labels_BS, logits_BSV.view(*labels_BS.shape, -1))

    return output, kept


def _as_micro_batch(part: TokenBatch) -> MicroBatch:
    (micro_batch,) = token_mean(part, len(part.tokens_BS))
    return micro_batch


def _whole_rows(runtime: Runtime, values_2BS: Tensor) -> Tensor:
    """Returns the whole rows of this rank's part (collective in the context group)."""
    if runtime.context_size == 1:
        return values_2BS
    parts = [torch.empty_like(values_2BS) for _ in range(runtime.context_size)]
    dist.all_gather(parts, values_2BS, group=runtime.context_group)
    return in_order(parts, dim=2)


def _score_labels(llm: LLM, labels_BS: Tensor, logits_BSV: Tensor) -> Tensor:
    """Returns [2, B, S]: log-likelihood of each label, and 1 if it is the likeliest token."""
    runtime = llm.runtime
    logits_BSV = logits_BSV.float()  # without a copy if they are; nothing else reads them
    first = runtime.tensor_rank * logits_BSV.shape[-1]
    logits_BSV[..., max(llm.shape.vocab_size - first, 0) :] = -torch.inf
    largest_BS = logits_BSV.max(dim=-1).values
    dist.all_reduce(largest_BS, op=dist.ReduceOp.MAX, group=runtime.tensor_group)
    mass_BS = _mass(logits_BSV, largest_BS)
    label_BS = _logit_of_label(logits_BSV, labels_BS - first)
    sums_2BS = torch.stack([mass_BS, label_BS])
    dist.all_reduce(sums_2BS, group=runtime.tensor_group)
    log_likelihood_BS = sums_2BS[1] - largest_BS - sums_2BS[0].log()
    return torch.stack([log_likelihood_BS, (sums_2BS[1] >= largest_BS).float()])


def _mass(logits_BSV: Tensor, largest_BS: Tensor) -> Tensor:
    """Returns [B, S]: the sum of exp(logit - largest), some positions at a time."""
    count = max(1, _LARGEST_CHUNK // (logits_BSV.shape[0] * logits_BSV.shape[-1]))
    pairs = zip(logits_BSV.split(count, dim=1), largest_BS.split(count, dim=1), strict=True)
    return torch.cat(
        [(part - largest[..., None]).exp_().sum(dim=-1) for part, largest in pairs], dim=1
    )


def _logit_of_label(logits_BSV: Tensor, row_BS: Tensor) -> Tensor:
    """Returns the label's logit if this rank has its row of the vocabulary, else 0."""
    mine_BS = (row_BS >= 0) & (row_BS < logits_BSV.shape[-1])
    found_BS = logits_BSV.gather(-1, row_BS.where(mine_BS, 0)[..., None])[..., 0]
    return found_BS.where(mine_BS, 0.0)
