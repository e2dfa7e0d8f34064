"""Gathers values of samples over all replicas."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_dwm.runtime import Runtime


def gather_samples(values_n: Tensor, runtime: Runtime) -> Tensor:
    """Gather values of the samples of all replicas, in the order of the batch (collective)."""
    if runtime.data_size == 1:
        return values_n
    whole = values_n.new_empty(len(values_n) * runtime.data_size)
    dist.all_gather_into_tensor(whole, values_n.contiguous(), group=runtime.data_group)
    return whole


def mean_over_samples(values_Kn: Tensor, runtime: Runtime) -> Tensor:
    """Returns [K], float64: means over the samples of the global batch (collective)."""
    means_K = values_Kn.double().mean(dim=1)
    dist.all_reduce(means_K, group=runtime.data_group)
    return means_K / runtime.data_size
