"""Splits the samples of a step over ranks, and gathers them inside the weighting group.

METHOD.md, section 3: every rank of the job has the whole weighting model. Inside an inner group
(the ranks of one LLM replica) every rank encodes its share of the replica's samples. The pooled
vectors are gathered with gradients, and each rank computes the same weights from them.

If several ranks compute the same loss, it is divided by their number before its backward pass. The
gathers sum gradients over their group, and the caller sums parameter gradients over the job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.runtime import Runtime


class GatherRows(torch.autograd.Function):
    """Gathers [n, ...] of every rank as [ranks * n, ...], by rank; backward sums over the ranks."""

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
    """Returns int64: the replica's samples that this rank of the inner group encodes.

    Every rank has the same number; if they do not divide evenly, the last ranks repeat the last
    sample.
    """
    share = -(-num_samples // runtime.inner_size)
    first = runtime.inner_rank * share
    return torch.arange(first, first + share).clamp(max=num_samples - 1)


def gather_inside_replica(part: Tensor, num_samples: int, runtime: Runtime) -> Tensor:
    """Gather the rows of `share_of_rank` from every rank of the inner group: [num_samples, ...]."""
    if runtime.inner_size == 1:
        return part
    return GatherRows.apply(part, runtime.inner_group)[:num_samples]


def gather_over_data(rows: Tensor, runtime: Runtime) -> Tensor:
    """Gather the rows of every replica, in the order of the global batch."""
    if runtime.data_size == 1:
        return rows
    return GatherRows.apply(rows, runtime.data_group)


@dataclass(frozen=True)
class Grouping:
    """The weighting groups: the samples of each micro-batch, or of the global batch."""

    runtime: Runtime
    micro_batch_size: int
    is_global: bool

    @property
    def ranks_with_same_groups(self) -> int:
        """Number of ranks that compute the weights of the same groups."""
        return self.runtime.world_size if self.is_global else self.runtime.inner_size

    def gather(self, rows_n: Tensor) -> Tensor:
        """Arrange this replica's rows [n, ...] in its groups, [G, size of a group, ...]."""
        if self.is_global:
            rows_n = gather_over_data(rows_n, self.runtime)
        size = rows_n.shape[0] if self.is_global else self.micro_batch_size
        return rows_n.view(-1, size, *rows_n.shape[1:])

    def local(self, values_Gn: Tensor) -> Tensor:
        """Returns this replica's values, [n]; the inverse of `gather`."""
        values_n = values_Gn.reshape(-1)
        if self.is_global:
            return values_n.chunk(self.runtime.data_size)[self.runtime.data_rank]
        return values_n
