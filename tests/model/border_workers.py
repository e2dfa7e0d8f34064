"""What the ranks of the tests of borders in a whole LLM run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_dwm.config import ParallelConfig
from megatron_dwm.model.layers.context import ContextPart, in_order, partial_rows
from megatron_dwm.model.layers.local import packed_pieces
from megatron_dwm.model.layers.pieces import pieces_of
from megatron_dwm.runtime import bring_up
from megatron_dwm.testing import random_batch, tiny_learner
from megatron_dwm.training import Learner

# Lengths of the documents in every row; even, so that sequence parallelism can split each alone.
LENGTHS = [[10, 30, 24], [34, 30]]
LENGTH = sum(LENGTHS[0])


def losses_and_gradients(tensor: int = 1, sequence: bool = False, **model: Any) -> dict[str, Any]:
    """Token losses of packed rows with borders, of each document alone, and of rows without
    borders; and the gradients of the sum of the first two.

    model: other keys of the model's section.
    """
    parallel = ParallelConfig(tensor=tensor, sequence=sequence)
    with bring_up(parallel, seed=1) as runtime:
        learner = tiny_learner(runtime, parallel=parallel, sequence_length=LENGTH, **model)
        for parameter in learner.llm.parameters():
            if parameter.dim() > 1:  # attention is far from uniform then
                parameter.data.mul_(8)
        batch = random_batch(0, runtime, rows=len(LENGTHS), sequence_length=LENGTH)
        borders_BS = torch.stack(
            [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
        )
        packed = packed_pieces(pieces_of(borders_BS))
        ours = _losses(learner, batch.tokens_BS, batch.labels_BS, packed)
        rows = [
            torch.cat(
                [
                    _losses(learner, tokens, labels)
                    for tokens, labels in zip(
                        tokens_1S.split(lengths, dim=1),
                        labels_1S.split(lengths, dim=1),
                        strict=True,
                    )
                ],
                dim=1,
            )
            for tokens_1S, labels_1S, lengths in zip(
                batch.tokens_BS.split(1), batch.labels_BS.split(1), LENGTHS, strict=True
            )
        ]
        alone = torch.cat(rows)
        return {
            "packed": ours.detach(),
            "alone": alone.detach(),
            "without borders": _losses(learner, batch.tokens_BS, batch.labels_BS).detach(),
            "gradient": _gradient(learner, ours),
            "gradient alone": _gradient(learner, alone),
        }


def parts_of_rows(tensor: int = 1, sequence: bool = False, **options: Any) -> dict[str, Any]:
    """Token losses and gradients of the same packed rows under context parallelism.

    options: context, and other keys of the model's section.
    """
    parallel = ParallelConfig(tensor=tensor, sequence=sequence, context=options.pop("context"))
    with bring_up(parallel, seed=1) as runtime:
        learner = tiny_learner(runtime, parallel=parallel, sequence_length=LENGTH, **options)
        for parameter in learner.llm.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(8)
        batch = random_batch(0, runtime, rows=len(LENGTHS), sequence_length=LENGTH)
        borders_BS = torch.stack(
            [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
        )
        part = ContextPart(runtime.context_rank, runtime.context_size)
        packed = partial_rows(part, borders_BS, LENGTH, runtime.device, torch.float32)
        tokens_BS, labels_BS = part.of_rows(batch.tokens_BS), part.of_rows(batch.labels_BS)
        ours_BS = _losses(learner, tokens_BS, labels_BS, packed)
        parts = [torch.empty_like(ours_BS) for _ in range(runtime.context_size)]
        dist.all_gather(parts, ours_BS.detach().contiguous(), group=runtime.context_group)
        return {"packed": in_order(parts, dim=1), "gradient": _gradient(learner, ours_BS)}


def _losses(
    learner: Learner, tokens_BS: Tensor, labels_BS: Tensor, packed: PackedSeqParams | None = None
) -> Tensor:
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    chunk = learner.llm.chunks[0]
    return chunk(tokens_BS, positions_BS, None, labels=labels_BS, packed_seq_params=packed)


def _gradient(learner: Learner, losses_BS: Tensor) -> Tensor:
    chunk = learner.llm.chunks[0]
    chunk.zero_grad_buffer()
    losses_BS.sum().backward()
    finalize_model_grads([chunk])  # sums what sequence parallelism leaves on each rank
    gradients = [parameter.main_grad.flatten() for parameter in learner.llm.parameters()]
    return torch.cat(gradients).clone()
