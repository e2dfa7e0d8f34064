"""Logits and weights of a weighting model, in the groups that its units are compared in.

A softmax over the global batch of a model that looks at one unit at a time is deferred: weights are
known up to a factor in the pass, one micro-batch at a time (deferred_softmax.py). Any other model's
weights need their whole group first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dwm.config import WeightingConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import ForwardOutputs
from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.concentration import weights_from_logits
from megatron_dwm.weighting.deferred_softmax import DeferredSoftmax
from megatron_dwm.weighting.encoding import encode
from megatron_dwm.weighting.feature_reader import FeatureReader
from megatron_dwm.weighting.groups import (
    Grouping,
    Groups,
    gather_inside_replica,
    rows_of_rank,
)
from megatron_dwm.weighting.model import WeightingModel, WeightingShape


def defers(config: WeightingConfig, shape: WeightingShape) -> bool:
    """True if the weights of such a model have their normalizer after the pass."""
    alone = shape.encoder == "llm" and not shape.across_samples
    return alone and config.group == "global" and config.normalizer == "deferred"


class Weigher:
    """A weighting model, equal on every rank of the job, with its groups."""

    def __init__(
        self,
        model: WeightingModel,
        config: WeightingConfig,
        runtime: Runtime,
        micro_batch_size: int,
        *,
        bf16: bool = False,
    ) -> None:
        """bf16: the model's own encoder computes products in bf16; see encoding.py."""
        self.model, self._config, self._runtime, self._bf16 = model, config, runtime, bf16
        self.grouping = Grouping(runtime, micro_batch_size, config.group == "global")
        self.deferred: DeferredSoftmax | None = None
        if defers(config, model.shape):
            self.deferred = DeferredSoftmax(
                min_effective_sample_size=config.min_effective_sample_size,
                uniform_floor=config.uniform_floor,
            )

    @property
    def weighs_relatively(self) -> bool:
        """True if weights are given before their normalizer is known."""
        return self.deferred is not None and self.deferred.is_ready

    def weights(self, batch: Batch, outputs: ForwardOutputs | None) -> Tensor:
        """Returns [n]: weights of this replica's units, relative ones if it weighs relatively."""
        if self.deferred is not None and self.deferred.is_ready:
            assert outputs is not None
            return self.deferred.relative(self._logits_alone(batch, outputs))
        groups = self.grouping.of(batch)
        if self.deferred is not None:  # a loaded model's first batch, of which all units are here
            self.deferred.settle_first(self._group_logits(batch, outputs, groups), groups.sizes_Gn)
        return groups.local(self.group_weights(batch, outputs, groups))

    def pool_logits(self, pool: Batch, outputs: ForwardOutputs | None, batches: int) -> Tensor:
        """Returns [n]: the logits of this replica's candidates, each computed in its group.

        batches: global batches in the pool; each is a group if groups are global.
        """
        groups = self.grouping.of(pool)
        parts = batches if self.grouping.is_global else 1
        return groups.local(self._group_logits(pool, outputs, groups, parts))

    def group_weights(self, batch: Batch, outputs: ForwardOutputs | None, groups: Groups) -> Tensor:
        """Returns [G, n]: the weights of this rank's groups."""
        return weights_from_logits(
            self._group_logits(batch, outputs, groups),
            groups.sizes_Gn,
            min_effective_sample_size=self._config.min_effective_sample_size,
            uniform_floor=self._config.uniform_floor,
            temperature_G=None if self.deferred is None else self.deferred.temperature,
        )

    def after_weighing(self, batch: Batch, relative_n: Tensor) -> None:
        """Set the next step's temperature from the relative weights of this one (collective)."""
        assert self.deferred is not None
        groups = self.grouping.of(batch)
        self.deferred.observe(groups.gather(relative_n), groups.sizes_Gn)

    @torch.no_grad()
    def settle(self, batch: Batch, outputs: ForwardOutputs | None, groups: Groups) -> None:
        """Set the temperature by what the model makes of this replica's batch (collective)."""
        if self.deferred is not None:
            self.deferred.settle(self._group_logits(batch, outputs, groups), groups.sizes_Gn)

    @torch.no_grad()
    def remember(self, batch: Batch, outputs: ForwardOutputs) -> None:
        """Add a batch to the running statistics of a model that has some (collective then)."""
        if isinstance(self.model.encoder, FeatureReader):
            group = self._runtime.data_group
            self.model.encoder.observe(self._rows(outputs), batch.units.sizes_U, group)

    def _group_logits(
        self, batch: Batch, outputs: ForwardOutputs | None, groups: Groups, parts: int = 1
    ) -> Tensor:
        """Returns [G, n]: the logits of this rank's groups, each divided into `parts` groups."""
        if self.model.shape.encoder == "own":
            pooled_GnD = _divided(groups.gather(self._encoded(batch)), parts)
        else:
            assert outputs is not None
            rows_GnK = _divided(groups.gather(self._rows(outputs)), parts)
            pooled_GnD = self.model.encoder(rows_GnK, groups.sizes_Gn)
        return self.model.logits(pooled_GnD, groups.present_Gn)

    def _logits_alone(self, batch: Batch, outputs: ForwardOutputs) -> Tensor:
        """Returns [n]: logits of units that depend on no other unit."""
        sizes_U = batch.units.sizes_U
        sizes_1n = None if sizes_U is None else sizes_U[None]
        return self.model.logits(self.model.encoder(self._rows(outputs)[None], sizes_1n))[0]

    def _rows(self, outputs: ForwardOutputs) -> Tensor:
        """Returns [n, 2 D + 1]: what the model reads of the LLM's forward pass."""
        assert outputs.features is not None
        rows_nK = torch.cat([outputs.features.flat(), outputs.losses_n[:, None]], dim=1)
        return rows_nK.to(self.model.sample_head.weight.dtype)

    def _encoded(self, batch: Batch) -> Tensor:
        """Returns [n, D]; the ranks of the inner group share out the replica's rows."""
        share, size = rows_of_rank(batch, self._runtime), self.grouping.micro_batch_size
        pooled_UD = encode(self.model.encoder, share, size, bf16=self._bf16)
        return gather_inside_replica(pooled_UD, batch, self._runtime)


def _divided(rows_GnK: Tensor, parts: int) -> Tensor:
    """Returns [G * parts, n / parts, K]."""
    groups, size, width = rows_GnK.shape
    return rows_GnK.reshape(groups * parts, size // parts, width)
