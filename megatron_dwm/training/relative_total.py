"""The normalizer of weights that a pass knows up to a factor (weighting/deferred_softmax.py)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.data import Batch
from megatron_dwm.model import PassResult
from megatron_dwm.runtime import Runtime


class RelativeTotal:
    """Sums s_u c_u and s_u over a replica's micro-batches, with sizes s and relative weights c."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)

    def add(self, part: Batch, relative_U: Tensor) -> None:
        """Add a micro-batch, on the last stage, where its weights are computed."""
        sizes_U = part.units.sizes_U
        if sizes_U is None:
            sizes_U = torch.full_like(relative_U, part.tokens_BS.shape[1])
        self._sums += torch.stack([(sizes_U * relative_U).sum(), sizes_U.sum()]).double()

    def of_replica(self) -> Tensor:
        """Returns sum s_u c_u of this replica, on every stage (collective, after the last one)."""
        return self._runtime.broadcast_from_last_stage(self._sums)[0]

    def divided(self, result: PassResult, batch: Batch) -> PassResult:
        """Returns the result with weights of mean 1 over the global batch (collective)."""
        relative_n = result.weights_n
        assert relative_n is not None and len(relative_n) == batch.units.count
        dist.all_reduce(self._sums, group=self._runtime.data_group)
        mean = (self._sums[0] / self._sums[1]).to(relative_n.dtype)
        return replace(result, weights_n=relative_n / mean, relative_n=relative_n)
