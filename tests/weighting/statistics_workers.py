"""What the ranks of the test of running statistics run."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dwm.config import ParallelConfig
from megatron_dwm.runtime import bring_up
from megatron_dwm.testing import replica_rows
from megatron_dwm.weighting.running_statistics import RunningStatistics

WIDTH = 3
ROWS = torch.randn(3, 8, 2 * WIDTH + 1, generator=torch.Generator().manual_seed(0)) * 2 + 1
SIZES = torch.tensor([1.0, 2.0, 0.0, 4.0, 1.0, 1.0, 3.0, 0.0])


def after_batches(sized: bool) -> Tensor:
    """Mean and deviations after three batches, read back from what `normalized` does."""
    with bring_up(ParallelConfig(), seed=0) as runtime:
        statistics, mine = RunningStatistics(WIDTH), replica_rows(runtime, ROWS.shape[1])
        for rows in ROWS:
            sizes = SIZES[mine] if sized else None
            statistics.observe(rows[mine], sizes, runtime.data_group)
        zero, one = (
            statistics.normalized(torch.full((1, 2 * WIDTH + 1), v))[0] for v in (0.0, 1.0)
        )
        deviation_K = 1.0 / (one - zero)
        return torch.cat([-zero * deviation_K, deviation_K[[0, WIDTH, 2 * WIDTH]]])
