"""The learned policy: weights from the weighting model, and its update from alignments.

One update follows the chain rule (METHOD.md, section 2):

    dL_val/dphi = sum_i dL_val/dw_i * dw_i/dphi,   dL_val/dw_i = -(eta/n) * s_i

as the gradient of -(1/n) sum_i a_i w_i(phi) with a_i held constant. a_i is s_i standardised inside
the weighting group, or eta * s_i as it stands. The raw scale of s drifts by orders of magnitude
during training (section 6), so standardising is the default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from megatron_dwm.config import WeightingConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.concentration import weights_from_logits
from megatron_dwm.weighting.groups import gather_inside_replica, gather_over_data, share_of_rank
from megatron_dwm.weighting.model import WeightingModel


@dataclass(frozen=True)
class WeightingUpdate:
    """One update of the weighting model.

    weights_n: float32, this replica's weights before the update.
    grad_norm: of the weighting model's gradient, before clipping.
    cosine: of that gradient to the previous update's; None for the first.
    """

    weights_n: Tensor
    grad_norm: float
    cosine: float | None


class DwmPolicy:
    """Weights from a weighting model that is replicated on every rank of the world."""

    def __init__(
        self,
        model: WeightingModel,
        config: WeightingConfig,
        runtime: Runtime,
        micro_batch_size: int,
        *,
        learned: bool = False,
    ) -> None:
        """`learned`: the model has been trained before, so its weights count from the start."""
        self.model = model.to(runtime.device)
        self.config = config
        self.runtime = runtime
        self.micro_batch_size = micro_batch_size
        self.learned = learned
        self._previous_gradient: Tensor | None = None
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )

    @torch.no_grad()
    def weights(self, batch: Batch) -> Tensor:
        """float32 [n], mean 1 in every weighting group; exactly 1 before the first update."""
        if not self.learned:
            return torch.ones(batch.size, device=self.runtime.device)
        return self._local(self._group_weights(batch))

    def update(self, batch: Batch, alignment_n: Tensor, learning_rate: float) -> WeightingUpdate:
        """One AdamW step of the weighting model towards a lower validation loss.

        batch, alignment_n: this replica's samples and their s_i. learning_rate: the LLM's eta,
        which matters only where alignments are not standardised.
        """
        weights_Gn = self._group_weights(batch)
        advantage_Gn = self._advantage(alignment_n, weights_Gn.detach(), learning_rate)
        num_samples = batch.size * self.runtime.data_size
        objective = -(advantage_Gn * weights_Gn).sum() / num_samples
        self.optimizer.zero_grad()
        (objective / self._ranks_with_same_groups).backward()
        gradient = self._sum_gradients()
        cosine = self._cosine_to_previous(gradient)
        limit = self.config.clip_grad or float("inf")
        grad_norm = float(clip_grad_norm_(self.model.parameters(), limit))
        self.optimizer.step()
        self.learned = True
        return WeightingUpdate(self._local(weights_Gn.detach()), grad_norm, cosine)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learned": self.learned,
            "previous_gradient": self._previous_gradient,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learned = state["learned"]
        self._previous_gradient = state["previous_gradient"]

    @property
    def _is_global(self) -> bool:
        return self.config.group == "global"

    @property
    def _ranks_with_same_groups(self) -> int:
        return self.runtime.world_size if self._is_global else self.runtime.inner_size

    def _group_weights(self, batch: Batch) -> Tensor:
        """[G, n]: weights of the groups that this rank sees."""
        share = share_of_rank(batch.size, self.runtime).to(batch.tokens_BS.device)
        pooled_BD = self.model.pool(batch.tokens_BS[share])
        pooled_nD = gather_inside_replica(pooled_BD, batch.size, self.runtime)
        if self._is_global:
            pooled_nD = gather_over_data(pooled_nD, self.runtime)
        logits_Gn = self.model.logits(self._in_groups(pooled_nD))
        return weights_from_logits(
            logits_Gn,
            min_effective_sample_size=self.config.min_effective_sample_size,
            uniform_floor=self.config.uniform_floor,
        )

    def _in_groups(self, rows_n: Tensor) -> Tensor:
        """[n, ...] -> [groups, size of a group, ...]."""
        size = rows_n.shape[0] if self._is_global else self.micro_batch_size
        return rows_n.view(-1, size, *rows_n.shape[1:])

    def _local(self, weights_Gn: Tensor) -> Tensor:
        """This replica's weights, [n]."""
        weights_n = weights_Gn.reshape(-1)
        if self._is_global:
            return weights_n.chunk(self.runtime.data_size)[self.runtime.data_rank]
        return weights_n

    def _advantage(self, alignment_n: Tensor, weights_Gn: Tensor, learning_rate: float) -> Tensor:
        if self._is_global:
            alignment_n = gather_over_data(alignment_n, self.runtime)
        alignment_Gn = self._in_groups(alignment_n)
        if not self.config.standardize:
            return alignment_Gn * learning_rate
        return standardise(alignment_Gn, weights_Gn)

    def _cosine_to_previous(self, gradient: Tensor) -> float | None:
        previous, self._previous_gradient = self._previous_gradient, gradient
        if previous is None:
            return None
        return float(torch.nn.functional.cosine_similarity(gradient, previous, dim=0))

    def _sum_gradients(self) -> Tensor:
        """Sum phi's gradient over the world, as one collective; the flat sum comes back."""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat


def standardise(alignment_Gn: Tensor, weights_Gn: Tensor) -> Tensor:
    """(s - weighted mean of s) / standard deviation of s, per group; 0 where s is constant."""
    centred_Gn = alignment_Gn - (alignment_Gn * weights_Gn).mean(-1, keepdim=True)
    deviation_G1 = alignment_Gn.std(-1, keepdim=True, correction=0)
    return torch.where(deviation_G1 > 0, centred_Gn / deviation_G1, 0.0)
