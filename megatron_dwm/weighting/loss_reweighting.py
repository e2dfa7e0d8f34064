"""Loss-based reweighting: harder samples weigh more (Sow et al., ICLR 2025, arXiv 2502.06733).

    u_i = (l_i - m) / d         l_i: token-mean loss of sample i under the LLM as it is
    w   = the guarded softmax of u / temperature over the weighting group

m and d are the running mean and standard deviation of the losses of earlier global batches (the
paper normalizes inside the batch), so the spread of the weights does not depend on the size of the
group. There is no model, no target and no update. Cost: none; over the global batch the softmax is
divided after the pass (pass_softmax.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.data import Batch
from megatron_dwm.model import ForwardOutputs
from megatron_dwm.weighting.concentration import GUARDS
from megatron_dwm.weighting.method import Counters, Needs
from megatron_dwm.weighting.moments import global_moments
from megatron_dwm.weighting.pass_softmax import SOFTMAX_PARTS, PassSoftmax
from megatron_dwm.weighting.rules import group_problems


class LossReweighting(PassSoftmax):
    """Weights from losses and their two running moments, the same on every rank."""

    gentler = f"{GUARDS}, or policy.loss_temperature"
    # Means of l and of l^2, float64, on the device, so that a step does not wait for them.
    moments: Tensor | None = None

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: losses and groups."""
        return SOFTMAX_PARTS | {"losses"}

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check the rules of groups."""
        yield from group_problems(config)

    @classmethod
    def first_weighed_step(cls, config: Config) -> int:
        """Returns 1, since the first batch only gives the moments."""
        return 1

    def needs(self, counters: Counters) -> Needs:
        """Returns losses after the first batch, and nothing before it."""
        if self.moments is None:
            return Needs()
        return self.pass_needs(losses=True)

    def weighs(self, counters: Counters) -> bool:
        """True after the first batch."""
        return self.moments is not None

    @torch.no_grad()
    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns float32 [n], the softmax in every group; all 1 for the first batch."""
        if self.moments is None:
            return torch.ones(batch.units.count, device=batch.tokens_BS.device)
        assert outputs is not None
        mean, square = self.moments
        deviation = (square - mean.square()).clamp(min=0.0).sqrt()
        centered_n = outputs.losses_n.double() - mean
        logits_n = torch.where(deviation > 0, centered_n / deviation, 0.0)
        return self.softmax((logits_n / self.config.loss_temperature).float(), batch)

    @torch.no_grad()
    def after_step(self, batch: Batch, losses_n: Tensor, counters: Counters) -> None:
        """Update the moments with the losses of this global batch (collective)."""
        found = global_moments(losses_n.detach(), batch, self.runtime)
        if self.moments is None:
            self.moments = found
        else:
            self.moments = torch.lerp(found, self.moments, self.config.loss_decay)

    def state_dict(self) -> dict[str, Any]:
        """Returns the moments, and the softmax's state."""
        moments = None if self.moments is None else self.moments.tolist()
        return {**super().state_dict(), "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of `state_dict`."""
        super().load_state_dict(state)
        moments = state["moments"]
        if moments is not None:
            moments = torch.tensor(moments, dtype=torch.float64, device=self.runtime.device)
        self.moments = moments
