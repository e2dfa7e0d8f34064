"""Training of the weighting model: one update from alignments.

An update follows the chain rule (METHOD.md, section 2):

    dL_val/dphi = sum_i dL_val/dw_i * dw_i/dphi,   dL_val/dw_i = -(eta/n) * s_i

It is computed as the gradient of -(1/n) sum_i a_i w_i(phi) with constant a_i. Units of different
sizes have their share of the sizes in place of 1/n. a_i is s_i
standardized inside the weighting group, or eta * s_i. The raw scale of s drifts by orders of
magnitude during training (section 6), so standardized alignments are the default. The LLM's
features of a sample do not depend on phi, so they are constants here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from megatron_dwm.config import WeightingConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import ForwardOutputs
from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.advantage import advantages, known_groups
from megatron_dwm.weighting.groups import Groups
from megatron_dwm.weighting.method import Alignments, WeightingUpdate
from megatron_dwm.weighting.model import WeightingModel
from megatron_dwm.weighting.noise import Reliability
from megatron_dwm.weighting.weigher import Weigher


class WeightingTrainer:
    """A weighting model, equal on every rank of the job, and its optimizer."""

    def __init__(
        self,
        model: WeightingModel,
        config: WeightingConfig,
        runtime: Runtime,
        micro_batch_size: int,
        *,
        learned: bool = False,
        bf16: bool = False,
    ) -> None:
        """Move the model to the device and build its optimizer.

        learned: the model was trained before, so it gives the weights from the first step on.
        bf16: the model's own encoder computes products in bf16; see encoding.py.
        """
        self.model = model.to(runtime.device)
        self.config = config
        self.weigher = Weigher(self.model, config, runtime, micro_batch_size, bf16=bf16)
        self.learned = learned
        self.reliability = Reliability()
        self._previous_gradient: Tensor | None = None
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )

    def update(
        self, batch: Batch, outputs: ForwardOutputs, alignments: Alignments
    ) -> WeightingUpdate:
        """Take one AdamW step toward a lower validation loss (collective over the job)."""
        self.reliability.observe(alignments.signal_to_noise)
        weigher = self.weigher
        groups = weigher.grouping.of(batch)
        if not self.learned:
            weigher.remember(batch, outputs)
        weights_Gn = weigher.group_weights(batch, outputs, groups)
        known = known_groups(groups, alignments)
        advantage_Gn = self._advantage(alignments, weights_Gn.detach(), known)
        objective = -known.mean(advantage_Gn * weights_Gn)
        self.optimizer.zero_grad()
        (objective / weigher.grouping.ranks_with_same_groups).backward()
        gradient = self._sum_gradients()
        cosine = self._cosine_to_previous(gradient)
        limit = self.config.clip_grad or float("inf")
        grad_norm = float(clip_grad_norm_(self.model.parameters(), limit))
        self._step()
        # The next step's statistics and temperature: what the model now makes of this batch.
        if self.learned:
            weigher.remember(batch, outputs)
        weigher.settle(batch, outputs, groups)
        self.learned = True
        return WeightingUpdate(groups.local(weights_Gn.detach()), grad_norm, cosine)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a resumed run needs."""
        deferred = self.weigher.deferred
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learned": self.learned,
            "previous_gradient": self._previous_gradient,
            "reliability": self.reliability.value,
            **({} if deferred is None else {"deferred": deferred.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`, but not its learning rate and weight decay."""
        self.model.load_state_dict(state["model"])
        mine = self.optimizer.state_dict()["param_groups"]
        moments = state["optimizer"]["state"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": mine})
        self.learned = state["learned"]
        previous, device = state["previous_gradient"], next(self.model.parameters()).device
        self._previous_gradient = None if previous is None else previous.to(device)
        self.reliability.value = state["reliability"]
        if self.weigher.deferred is not None:
            self.weigher.deferred.load_state_dict(state["deferred"], device)

    def _advantage(self, alignments: Alignments, weights_Gn: Tensor, known: Groups) -> Tensor:
        standardized = self.config.standardize
        if not standardized and alignments.known_n is None:
            # A softmax of mean 1 does not change with the mean of what multiplies it.
            return known.gather(alignments.values_n) * alignments.learning_rate
        return advantages(
            alignments,
            weights_Gn,
            known,
            standardized=standardized,
            uniform_floor=self.config.uniform_floor,
        )

    def _step(self) -> None:
        if self.config.damp_by_noise:
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * self.reliability.factor
        self.optimizer.step()

    def _cosine_to_previous(self, gradient: Tensor) -> float | None:
        previous, self._previous_gradient = self._previous_gradient, gradient
        if previous is None:
            return None
        return float(torch.nn.functional.cosine_similarity(gradient, previous, dim=0))

    def _sum_gradients(self) -> Tensor:
        """Sum phi's gradient over all ranks in one collective; returns the flat sum."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat
