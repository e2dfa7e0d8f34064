"""Samples of a step shared out over ranks, and gathered again inside the weighting group.

METHOD.md, section 3: the weighting model is replicated on every rank of the world. Inside one inner
group (the ranks that hold one LLM replica) every rank encodes its share of the replica's samples;
the pooled vectors are gathered differentiably, and each rank computes the same weights from them.

A loss that several ranks compute alike is divided by their number before its backward pass; the
gathers sum gradients over their group, and the caller sums parameter gradients over the world.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.runtime import Runtime


class GatherRows(torch.autograd.Function):
    """[n, ...] on every rank -> [ranks * n, ...] in rank order; backward sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
        dist.all_gather_into_tensor(whole, rows.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed.chunk(ctx.group.size())[ctx.group.rank()], None


def share_of_rank(num_samples: int, runtime: Runtime) -> Tensor:
    """int64: the local samples that this rank of the inner group encodes, as many on each rank.

    Where the samples do not divide, the last ranks repeat the last sample.
    """
    share = -(-num_samples // runtime.inner_size)
    first = runtime.inner_rank * share
    return torch.arange(first, first + share).clamp(max=num_samples - 1)


def gather_inside_replica(part: Tensor, num_samples: int, runtime: Runtime) -> Tensor:
    """The rows of `share_of_rank` from every rank of the inner group: [num_samples, ...]."""
    if runtime.inner_size == 1:
        return part
    return GatherRows.apply(part, runtime.inner_group)[:num_samples]


def gather_over_data(rows: Tensor, runtime: Runtime) -> Tensor:
    """The rows of every replica, in the order of the global batch."""
    if runtime.data_size == 1:
        return rows
    return GatherRows.apply(rows, runtime.data_group)
