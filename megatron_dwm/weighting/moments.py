"""First and second moments of a number of every unit, over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dwm.data import Batch
from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.groups import gather_over_data, units_of_replicas
from megatron_dwm.weighting.standardize import mean_over_units


def global_moments(values_n: Tensor, batch: Batch, runtime: Runtime) -> Tensor:
    """Returns float64 [2], the means of v and of v^2 over the global batch (collective).

    values_n: of this replica's units of `batch`, each of which counts in proportion to its size.
    """
    counts, sizes_U = units_of_replicas(batch, runtime), batch.units.sizes_U
    values_N = gather_over_data(values_n, runtime, counts).double()
    if sizes_U is not None:
        sizes_U = gather_over_data(sizes_U, runtime, counts).double()
    return torch.cat([mean_over_units(each_N, sizes_U) for each_N in (values_N, values_N.square())])
