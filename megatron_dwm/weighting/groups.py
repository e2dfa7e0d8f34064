"""Splits the units of a step over ranks, and gathers them inside the weighting group.

METHOD.md, section 3: every rank of the job has the whole weighting model. Inside an inner group
(the ranks of one LLM replica) every rank encodes its share of the replica's rows. The pooled
vectors are gathered with gradients, and each rank computes the same weights from them.

If several ranks compute the same loss, it is divided by their number before its backward pass. The
gathers sum gradients over their group, and the caller sums parameter gradients over the job.

Where documents are the units, replicas and micro-batches have different numbers of them. Gathers
are then padded to the largest number, and so are the groups of micro-batches; padding has size 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.data import Batch
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


def rows_of_rank(batch: Batch, runtime: Runtime) -> Batch:
    """Returns the rows of the replica that this rank of the inner group encodes.

    Every rank has the same number; if they do not divide evenly, the last ranks repeat the last
    row.
    """
    first, stop, repeated = _share(batch.size, runtime.inner_size, runtime.inner_rank)
    last = batch.rows(batch.size - 1, batch.size)
    return Batch.concatenate([batch.rows(first, stop), *[last] * repeated])


def gather_inside_replica(part_UD: Tensor, batch: Batch, runtime: Runtime) -> Tensor:
    """Gather the units of `rows_of_rank` from every rank of the inner group: [U, ...]."""
    if runtime.inner_size == 1:
        return part_UD
    counts, kept = [], []
    for rank in range(runtime.inner_size):
        first, stop, repeated = _share(batch.size, runtime.inner_size, rank)
        kept.append(sum(batch.units_per_row[first:stop]))
        counts.append(kept[-1] + repeated * batch.units_per_row[-1])
    gathered = GatherRows.apply(_padded(part_UD, max(counts)), runtime.inner_group)
    parts = gathered.split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, kept, strict=True)])


def units_of_replicas(batch: Batch, runtime: Runtime) -> list[int]:
    """Returns the number of units of every replica; a collective call if documents are units."""
    count = batch.units.count
    # Only documents may be more on one replica than on another.
    if batch.units_BS is None or runtime.data_size == 1:
        return [count] * runtime.data_size
    mine = torch.full((1,), count, device=runtime.device)
    return gather_over_data(mine, runtime).tolist()


def gather_over_data(rows_U: Tensor, runtime: Runtime, counts: list[int] | None = None) -> Tensor:
    """Gather the rows of every replica, in the order of the global batch.

    counts: number of rows of each replica; None if all have the same number.
    """
    if runtime.data_size == 1:
        return rows_U
    if counts is None or len(set(counts)) == 1:
        return GatherRows.apply(rows_U, runtime.data_group)
    gathered = GatherRows.apply(_padded(rows_U, max(counts)), runtime.data_group)
    parts = gathered.split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _share(rows: int, ranks: int, rank: int) -> tuple[int, int, int]:
    """Returns first and last + 1 of the rows of a rank, and how often it repeats the last row."""
    share = -(-rows // ranks)
    first, stop = min(rank * share, rows), min((rank + 1) * share, rows)
    return first, stop, share - (stop - first)


def _padded(rows_U: Tensor, length: int) -> Tensor:
    missing = length - len(rows_U)
    if not missing:
        return rows_U
    return torch.cat([rows_U, rows_U.new_zeros(missing, *rows_U.shape[1:])])


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The weighting groups of one batch, G groups of at most n units.

    counts: number of units of each replica, for groups over all of them; else of each group.
    sizes_Gn: how much every unit counts, 0 for padding; None: all count the same, without padding.
    """

    runtime: Runtime
    is_global: bool
    counts: list[int]
    sizes_Gn: Tensor | None = None

    @property
    def present_Gn(self) -> Tensor | None:
        """True where there is a unit; None if there is no padding."""
        if self.sizes_Gn is None or not self._is_padded:
            return None
        device = self.sizes_Gn.device
        counts_G1 = torch.tensor(self.counts).to(device, non_blocking=True)[:, None]
        return torch.arange(max(self.counts), device=device) < counts_G1

    @property
    def _is_padded(self) -> bool:
        """True if groups have different numbers of units."""
        return not self.is_global and len(set(self.counts)) > 1

    def gather(self, rows_U: Tensor) -> Tensor:
        """Arrange this replica's rows [U, ...] in their groups, [G, n, ...]."""
        if self.is_global:
            return gather_over_data(rows_U, self.runtime, self.counts)[None]
        if len(set(self.counts)) == 1:
            return rows_U.view(len(self.counts), -1, *rows_U.shape[1:])
        longest = max(self.counts)
        return torch.stack([_padded(rows, longest) for rows in rows_U.split(self.counts)])

    def local(self, values_Gn: Tensor) -> Tensor:
        """Returns this replica's values, [U]; the inverse of `gather`."""
        if self.is_global:
            return values_Gn.reshape(-1).split(self.counts)[self.runtime.data_rank]
        if not self._is_padded:
            return values_Gn.reshape(-1)
        rows = zip(values_Gn, self.counts, strict=True)
        return torch.cat([values_n[:count] for values_n, count in rows])

    def only(self, kept_n: Tensor) -> Groups:
        """Returns the same groups in which only these of this replica's units count."""
        kept_Gn = self.gather(kept_n.float())
        return replace(self, sizes_Gn=kept_Gn if self.sizes_Gn is None else self.sizes_Gn * kept_Gn)

    def mean(self, values_Gn: Tensor) -> Tensor:
        """Returns the part of these groups in the mean over the global batch's units."""
        if self.sizes_Gn is None:
            replicas = 1 if self.is_global else self.runtime.data_size
            return values_Gn.sum() / (sum(self.counts) * replicas)
        total = self.sizes_Gn.sum()
        if not self.is_global:
            dist.all_reduce(total, group=self.runtime.data_group)
        return (self.sizes_Gn * values_Gn).sum() / total


@dataclass(frozen=True)
class Grouping:
    """The rule of the weighting groups: the units of each micro-batch, or of the global batch."""

    runtime: Runtime
    micro_batch_size: int
    is_global: bool

    @property
    def ranks_with_same_groups(self) -> int:
        """Number of ranks that compute the weights of the same groups."""
        return self.runtime.world_size if self.is_global else self.runtime.inner_size

    def of(self, batch: Batch) -> Groups:
        """Returns the groups of this replica's batch, or of one of its micro-batches.

        A collective call if groups are global and documents are units.
        """
        if self.is_global:
            counts = units_of_replicas(batch, self.runtime)
        else:
            firsts = list(accumulate(batch.units_per_row, initial=0))[:: self.micro_batch_size]
            counts = [stop - first for first, stop in pairwise(firsts)]
        groups = Groups(runtime=self.runtime, is_global=self.is_global, counts=counts)
        sizes_U = batch.units.sizes_U
        return groups if sizes_U is None else replace(groups, sizes_Gn=groups.gather(sizes_U))
