"""Gathers values of units over all replicas."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.groups import gather_over_data


def gather_units(values_Kn: Tensor, counts: list[int], runtime: Runtime) -> Tensor:
    """Gather values of the units of all replicas, in the order of the batch (collective).

    values_Kn: [n] or [K, n]. counts: number of units of each replica.
    """
    return gather_over_data(values_Kn.t(), runtime, counts).t()


def mean_over_batch(values_Kn: Tensor, sizes_n: Tensor | None, runtime: Runtime) -> Tensor:
    """Returns [K], float64: means over the units of the global batch (collective).

    sizes_n: how much each unit counts; None: all the same.
    """
    if sizes_n is None:
        means_K = values_Kn.double().mean(dim=1)
        dist.all_reduce(means_K, group=runtime.data_group)
        return means_K / runtime.data_size
    sized_Kn = torch.cat([values_Kn, torch.ones_like(sizes_n)[None]]).double() * sizes_n
    sums_K = sized_Kn.sum(dim=1)
    dist.all_reduce(sums_K, group=runtime.data_group)
    return sums_K[:-1] / sums_K[-1]
