"""Losses and weights of units, of a replica's or of the whole batch's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.data import Batch
from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.groups import gather_over_data, units_of_replicas


@dataclass(frozen=True, kw_only=True)
class WeighedUnits:
    """Losses and weights of n units of this replica.

    losses_n, weights_n: float32; losses are token means.
    sizes_n: float32, how much each unit counts; None: all the same.
    counts: number of units of every replica.
    rows: of this replica, if tokens are units; else None.
    reference_losses_n: as losses_n, of a reference model; None without one, and after an update.
    """

    losses_n: Tensor
    weights_n: Tensor
    sizes_n: Tensor | None
    counts: list[int]
    rows: int | None = None
    reference_losses_n: Tensor | None = None

    def gather(self, values_n: Tensor, runtime: Runtime) -> Tensor:
        """Gather values of these units of all replicas, in the batch's order (collective)."""
        return gather_over_data(values_n, runtime, self.counts)

    def recorded(self) -> WeighedUnits:
        """Returns what is recorded: units with an origin. Tokens are recorded by their row's mean.

        The weight of a row is its tokens' mean weight, so the mean over rows of equal size is 1.
        """
        if self.rows is None:
            return self
        assert self.sizes_n is not None
        sizes_BS = self.sizes_n.view(self.rows, -1)
        losses_B, weights_B = (
            (sizes_BS * values_n.view_as(sizes_BS)).sum(dim=1) / sizes_BS.sum(dim=1).clamp(min=1.0)
            for values_n in (self.losses_n, self.weights_n)
        )
        return WeighedUnits(
            losses_n=losses_B,
            weights_n=weights_B,
            sizes_n=sizes_BS.sum(dim=1),
            counts=[self.rows] * len(self.counts),
        )

    def gathered_sizes(self, runtime: Runtime) -> Tensor | None:
        """Returns the sizes of the global batch's units; a collective call if there are sizes."""
        return None if self.sizes_n is None else self.gather(self.sizes_n, runtime)

    def mean(self, values_Kn: Tensor, runtime: Runtime) -> Tensor:
        """Returns [K], float64: means over the units of the global batch (collective)."""
        if self.sizes_n is None:
            means_K = values_Kn.double().mean(dim=1)
            dist.all_reduce(means_K, group=runtime.data_group)
            return means_K / runtime.data_size
        ones_1n = torch.ones_like(self.sizes_n)[None]
        sums_K = (torch.cat([values_Kn, ones_1n]).double() * self.sizes_n).sum(dim=1)
        dist.all_reduce(sums_K, group=runtime.data_group)
        return sums_K[:-1] / sums_K[-1]


def weighed_units(
    batch: Batch,
    losses_n: Tensor,
    weights_n: Tensor,
    runtime: Runtime,
    *,
    reference_losses_n: Tensor | None = None,
) -> WeighedUnits:
    """Returns the units of this replica's batch; a collective call if documents are units."""
    return WeighedUnits(
        losses_n=losses_n,
        weights_n=weights_n,
        sizes_n=batch.units.sizes_U,
        counts=units_of_replicas(batch, runtime),
        rows=batch.size if batch.tokens_are_units else None,
        reference_losses_n=reference_losses_n,
    )
