"""One pass of micro-batches through Megatron-Core's pipeline schedules.

Everything that runs the LLM goes through here: training, the validation pass at the virtual
parameters, the tangent probe and evaluation. A pass minimises

    sum over samples and tokens of coefficient * token loss / denominator,

where the denominator is a float summed over micro-batches and data-parallel ranks. With
coefficients of 1 these are the operations of Megatron-LM's own per-token loss, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from megatron_dwm.model.llm import LLM

# Megatron-Core adds up an integer token count that we do not use: weights make it a float.
_NO_COUNT = torch.zeros([], dtype=torch.int)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads.

    coefficients_BS: float32 factor of every token's loss.
    loss_mask_BS: float32, 1 where a token's loss counts; for `loss_sums_B` only.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    coefficients_BS: Tensor
    loss_mask_BS: Tensor


@dataclass(frozen=True)
class PassResult:
    """What a pass leaves behind, known on every rank of the replica.

    loss_sums_n: float32, every local sample's masked sum of token losses, in order.
    token_counts_n: float32, the tokens in each of those sums.
    """

    loss_sums_n: Tensor
    token_counts_n: Tensor

    @property
    def sample_losses_n(self) -> Tensor:
        """Token-mean loss of every local sample; 0 for a sample without a counted token."""
        return self.loss_sums_n / self.token_counts_n.clamp(min=1.0)


def forward_backward(
    llm: LLM,
    micro_batches: Sequence[MicroBatch],
    *,
    denominator: float | None,
    on_micro_batch: Callable[[int], None] | None = None,
) -> PassResult:
    """Run forward and backward over `micro_batches`; gradients end in the gradient buffers.

    denominator: this data-parallel rank's part of the global denominator. None leaves the
        gradients local and unscaled (the tangent probe forms none).
    on_micro_batch: told the index of a micro-batch before its forward and its backward pass.
    """
    return _run(llm, micro_batches, False, denominator, on_micro_batch)


def forward_only(llm: LLM, micro_batches: Sequence[MicroBatch]) -> PassResult:
    """Losses of `micro_batches` without gradients."""
    with torch.no_grad():
        return _run(llm, micro_batches, True, None, None)


def _run(
    llm: LLM,
    micro_batches: Sequence[MicroBatch],
    forward_only: bool,
    denominator: float | None,
    on_micro_batch: Callable[[int], None] | None,
) -> PassResult:
    batch_size, sequence_length = micro_batches[0].tokens_BS.shape
    llm.transformer.finalize_model_grads_func = (
        None if denominator is None else partial(_finalise, llm, denominator)
    )
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, on_micro_batch),
        data_iterator=[enumerate(micro_batches) for _ in llm.chunks],
        model=llm.chunks,
        num_microbatches=len(micro_batches),
        seq_length=sequence_length,
        micro_batch_size=batch_size,
        forward_only=forward_only,
    )
    return _collect(llm, micro_batches, outputs)


def _forward_step(
    on_micro_batch: Callable[[int], None] | None,
    iterator: Iterator[tuple[int, MicroBatch]],
    chunk: Module,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Megatron's forward_step_func."""
    index, batch = next(iterator)
    if on_micro_batch is not None:
        on_micro_batch(index)
    output = chunk(batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS)
    if on_micro_batch is not None and output.requires_grad:
        # Activation recomputation runs modules again in the backward pass, when another
        # micro-batch may have gone forward since.
        output.register_hook(lambda _: on_micro_batch(index))
    return output, partial(_loss, batch)


def _loss(batch: MicroBatch, token_losses_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's loss_func: (sum to differentiate, unused count, what to keep)."""
    losses = token_losses_BS.float()
    total = torch.sum(losses.view(-1) * batch.coefficients_BS.view(-1))
    kept_B = (losses.detach() * batch.loss_mask_BS).sum(dim=1)
    return total, _NO_COUNT, kept_B


def _finalise(
    llm: LLM, denominator: float, chunks: list[Module], _: Tensor | None, **options: Any
) -> None:
    """Megatron's finalize_model_grads with a float denominator in place of its integer count."""
    finalize_model_grads(chunks, None, **options)
    total = torch.tensor(denominator, dtype=torch.float32, device=llm.runtime.device)
    dist.all_reduce(total, group=llm.runtime.data_group)
    for chunk in chunks:
        chunk.scale_gradients(1.0 / total)


def _collect(llm: LLM, micro_batches: Sequence[MicroBatch], outputs: list[Tensor]) -> PassResult:
    counts_n = torch.cat([batch.loss_mask_BS.sum(dim=1) for batch in micro_batches])
    losses_n = torch.cat(outputs) if llm.runtime.is_last_stage else torch.empty_like(counts_n)
    return PassResult(llm.runtime.broadcast_from_last_stage(losses_n), counts_n)
