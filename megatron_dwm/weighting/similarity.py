"""Similarity to the target: samples whose hidden states resemble the target's weigh more.

    c_i = cos(f_i, m)       f_i: pooled hidden states of sample i under the LLM as it is
    w   = the guarded softmax of c / temperature over the weighting group

f has the last hidden state and an early layer's, each scaled to a root mean square of 1; m is the
mean of the same over the passages of a validation batch, and is read anew every
`weighting.interval_steps` steps. Nothing is learned. This follows the idea of ADAPT (Zhao et al.,
arXiv 2605.05227); METHOD.md, section 5, says what is known of it.

Cost: a forward pass of the passages for every reading. The samples' features come with the training
pass; over the global batch the softmax is divided after it (pass_softmax.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.model import Features, ForwardOutputs, LlamaShape
from megatron_dwm.model.flops import llm_forward_flops
from megatron_dwm.weighting.concentration import GUARDS
from megatron_dwm.weighting.costs import Costs, Workload
from megatron_dwm.weighting.method import Counters, Needs
from megatron_dwm.weighting.pass_softmax import SOFTMAX_PARTS, PassSoftmax
from megatron_dwm.weighting.rules import group_problems, target_problems
from megatron_dwm.weighting.schedule import Schedule, online


class Similarity(PassSoftmax):
    """Weights from the direction of the target's mean features, the same on every rank."""

    gentler = f"{GUARDS}, or policy.similarity_temperature"
    # float32 [2 D], on the device; None before the target is read.
    mean: Tensor | None = None

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a target whose passages updates read, features and groups."""
        return SOFTMAX_PARTS | {"target", "passages", "updates", "similarity"}

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check the rules of the target, of groups, of the schedule and of the layer."""
        yield from target_problems(config)
        yield from group_problems(config)
        if config.weighting.mode == "staged":
            yield (
                "weighting.mode staged: policy similarity reads the target every "
                "weighting.interval_steps steps; set weighting.mode online"
            )
        if not 1 <= config.policy.similarity_layer <= num_layers:
            yield (
                f"policy.similarity_layer {config.policy.similarity_layer}: expected 1 to the "
                f"LLM's number of layers, {num_layers}"
            )

    @classmethod
    def schedule(cls, config: Config) -> Schedule:
        """Returns a reading after the warm-up and then one every interval."""
        steps, weighting = config.training.steps, config.weighting
        found = online(
            steps,
            warmup=weighting.warmup_steps,
            interval=weighting.interval_steps,
            last=round(weighting.freeze_after * steps, 6),
            in_step=False,
        )
        return replace(found, fresh=False)

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """Returns the step of the first reading."""
        return cls.schedule(config).first_update

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns the softmax's costs and the passages' forward pass."""
        costs = super().costs(config, llm, workload)
        passages = config.passages if workload.passages is None else workload.passages
        length, attended = config.data.sequence_length, workload.documents.attended_tokens
        return replace(costs, update_passes=llm_forward_flops(llm, passages, length, attended))

    def needs(self, counters: Counters) -> Needs:
        """Returns features once the target is read, and nothing before."""
        if self.mean is None:
            return Needs()
        return self.pass_needs(early_layer=self.config.similarity_layer)

    @property
    def update_needs(self) -> Needs:
        """Features of the passages."""
        return Needs(early_layer=self.config.similarity_layer)

    def weighs(self, counters: Counters) -> bool:
        """True once the target is read."""
        return self.mean is not None

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], the softmax in every group; all 1 before the first reading."""
        if self.mean is None:
            return torch.ones(batch.units.count, device=batch.tokens_BS.device)
        assert outputs is not None and outputs.features is not None
        cosines_n = F.cosine_similarity(_scaled(outputs.features), self.mean, dim=1)
        return self.softmax(cosines_n / self.config.similarity_temperature, batch)

    @torch.no_grad()
    def read_target(self, passages: Batch, outputs: ForwardOutputs) -> None:
        """Set the mean to that of these passages, each counting in proportion to its size."""
        assert outputs.features is not None
        sizes_U = passages.units.sizes_U
        assert sizes_U is not None, "rows without loss do not count"
        sums_K = (sizes_U[:, None] * _scaled(outputs.features)).sum(dim=0, dtype=torch.float64)
        sums = torch.cat([sums_K, sizes_U.sum(dtype=torch.float64)[None]])
        dist.all_reduce(sums, group=self.runtime.data_group)
        self.mean = (sums[:-1] / sums[-1]).float()

    def state_dict(self) -> dict[str, Any]:
        """Returns the mean, and the softmax's state."""
        return {**super().state_dict(), "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""
        super().load_state_dict(state)
        mean = state["mean"]
        self.mean = None if mean is None else mean.to(self.runtime.device)


def _scaled(features: Features) -> Tensor:
    """Returns [n, 2 D], in which both states count the same.

    The scale of a hidden state depends on its layer and grows during training.
    """
    parts = (features.final_nD, features.early_nD)
    return torch.cat([F.rms_norm(part, part.shape[-1:]) for part in parts], dim=1)
