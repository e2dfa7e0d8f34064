"""The yardstick: one step of plain Megatron-Core training, with nothing of ours but the model.

Written after the order of Megatron-LM's training.py and pretrain_gpt.py: zero the gradients, run
the schedule with a loss that returns (sum, integer token count, what to report), let
finalize_model_grads divide by the summed count, step the optimiser and the schedule of its
learning rate, average the reported loss over the data-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron_dwm.training.session import Session
from torch import Tensor
from torch.nn import Module

from megatron_dwm.data.batch import Batch

LossOutput = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PlainLoop:
    """micro_batches: split once beforehand, as a data loader would hand them over."""

    session: Session
    micro_batches: list[Batch]

    def step(self) -> float:
        """One optimiser step (collective); the mean token loss, 0 where no loss is computed."""
        session = self.session
        llm, optimizer = session.llm, session.optimizer
        llm.transformer.finalize_model_grads_func = finalize_model_grads
        for chunk in llm.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        rows, length = self.micro_batches[0].tokens_BS.shape
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(self.micro_batches) for _ in llm.chunks],
            model=llm.chunks,
            num_microbatches=len(self.micro_batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=False,
        )
        optimizer.step()
        session.scheduler.step(increment=1)
        if not reports:
            return 0.0
        loss_and_count = torch.vstack(reports).sum(dim=0)
        dist.all_reduce(loss_and_count, group=session.runtime.data_group)
        return float(loss_and_count[0] / loss_and_count[1])


def _forward_step(iterator: Iterator[Batch], chunk: Module) -> tuple[Tensor, partial[LossOutput]]:
    batch = next(iterator)
    losses_BS = chunk(batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS)
    return losses_BS, partial(_loss, batch.loss_mask_BS)


def _loss(loss_mask_BS: Tensor, losses_BS: Tensor) -> LossOutput:
    mask = loss_mask_BS.view(-1)
    loss = torch.sum(losses_BS.view(-1).float() * mask)
    count = mask.sum().detach().to(torch.int)
    return loss, count, torch.stack([loss.detach(), count.float()])
