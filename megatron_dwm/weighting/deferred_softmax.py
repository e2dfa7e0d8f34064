"""A softmax over the global batch whose normalizer is known after the pass (METHOD.md, section 10).

    c_i = (1 - f) exp((a_i - r) / T) + f        in the pass: T and r are those of the step before
    w_i = c_i / mean of c                       after it, over the whole batch, so the mean is 1
    g   = sum_i c_i grad l_i / sum_i c_i        the pass divides once, at its end

At this temperature T it is exactly the softmax over the batch, whatever the micro-batches are and
however small; uniform floor f and equal logits included. r only sets the scale: with r = T log mean
exp(a / T) of the step before, c has a mean near 1, which is also what the floor is measured by.

The bound on the effective sample size sets T from the logits of the step before, so it can be
missed by what the logits change in between; `drift` is by how much. Cost in a step: 8 bytes a unit
sent over the data-parallel ranks, and a bisection over n numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dwm.weighting.concentration import (
    effective_sample_size,
    temperature,
    weights_from_logits,
)
from megatron_dwm.weighting.standardize import mean_over_units

# e^60 is far below the largest float32, and a unit so far above the others has the whole batch. If
# all units of a batch are as far below those of the step before, e^-60 keeps their sum above 0.
_LARGEST_EXPONENT = 60.0


class DeferredSoftmax:
    """The temperature and the scale that the next step's weights have, equal on every rank.

    temperature, reference: float32 scalars T and r; None before any logits were seen.
    drift: effective sample size of the last step's weights, less what it would have been with the
        batch's own temperature, as fractions of the batch; None before the first step.
    """

    def __init__(self, *, min_effective_sample_size: float, uniform_floor: float) -> None:
        self._bound, self._floor = min_effective_sample_size, uniform_floor
        self.temperature: Tensor | None = None
        self.reference: Tensor | None = None
        self.drift: Tensor | None = None
        self._is_settled = False
        self._in_pass: tuple[Tensor, Tensor] | None = None

    @property
    def is_ready(self) -> bool:
        """True if weights can be computed before their normalizer is known."""
        return self.temperature is not None

    def begin_step(self) -> None:
        """Keep the T and r of the coming pass: an update inside the step settles others.

        What settled them before, such as an update between steps, has had its effect.
        """
        self._is_settled = False
        if self.temperature is not None and self.reference is not None:
            self._in_pass = self.temperature, self.reference

    def relative(self, logits_n: Tensor) -> Tensor:
        """Returns c [n] for any units of a batch."""
        assert self.temperature is not None and self.reference is not None
        exponent_n = (logits_n - self.reference) / self.temperature
        relative_n = exponent_n.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp()
        return relative_n * (1.0 - self._floor) + self._floor if self._floor else relative_n

    def settle_first(self, logits_Gn: Tensor, sizes_Gn: Tensor | None) -> None:
        """Settle by the first batch that is weighed, which is read first.

        A batch with a logit that is NaN or infinite, whose step is skipped, and one in which no
        unit counts, settle nothing, and the next batch is read first. A unit that is to have no
        weight may have -inf.
        """
        counted_Gn = logits_Gn.isfinite() & (True if sizes_Gn is None else sizes_Gn > 0)
        if bool((logits_Gn < torch.inf).all() & counted_Gn.any()):
            self.settle(logits_Gn, sizes_Gn)

    def settle(self, logits_Gn: Tensor, sizes_Gn: Tensor | None) -> None:
        """Take T and r for the next step from logits [1, n] of a whole batch, once a step."""
        self._set(self._own_temperature(logits_Gn, sizes_Gn), logits_Gn, sizes_Gn)
        self._is_settled = True

    def observe(self, relative_Gn: Tensor, sizes_Gn: Tensor | None) -> None:
        """Measure the drift of a step's c [1, n]; T and r follow, unless an update settled them."""
        logits_Gn = self._logits(relative_Gn)
        own = self._own_temperature(logits_Gn, sizes_Gn)
        own_Gn = weights_from_logits(
            logits_Gn,
            sizes_Gn,
            min_effective_sample_size=self._bound,
            uniform_floor=self._floor,
            temperature_G=own[None],
        )
        used = effective_sample_size(relative_Gn.double(), sizes_Gn)  # squares of e^60 overflow
        self.drift = (used - effective_sample_size(own_Gn, sizes_Gn))[0].to(relative_Gn.dtype)
        if not self._is_settled:
            self._set(own, logits_Gn, sizes_Gn)
        self._is_settled = False

    def statistics(self) -> dict[str, Tensor]:
        """Returns the temperature of the next step and the last one's drift, once both exist."""
        if self.drift is None or self.temperature is None:
            return {}
        return {
            "weight_temperature": self.temperature,
            "weight_effective_sample_size_drift": self.drift,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs."""
        return {
            "temperature": self.temperature,
            "reference": self.reference,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Load the state of `state_dict`, whose tensors may be on another device.

        An empty one is that before the first batch.
        """
        self.temperature = _moved(state.get("temperature"), device)
        self.reference = _moved(state.get("reference"), device)
        self.drift = None
        self._is_settled, self._in_pass = False, None

    def _own_temperature(self, logits_Gn: Tensor, sizes_Gn: Tensor | None) -> Tensor:
        if not self._bound:
            return torch.ones_like(logits_Gn[0, 0])
        return temperature(logits_Gn, self._bound, sizes_Gn)[0]

    def _logits(self, relative_Gn: Tensor) -> Tensor:
        """Returns the logits from which the last pass made c [1, n]."""
        found, scale = self._in_pass or (self.temperature, self.reference)
        assert found is not None and scale is not None
        above_Gn = (relative_Gn - self._floor) / (1.0 - self._floor)
        smallest = torch.finfo(above_Gn.dtype).tiny
        return scale + found * above_Gn.clamp(min=smallest).log()

    def _set(self, found: Tensor, logits_Gn: Tensor, sizes_Gn: Tensor | None) -> None:
        """Set T and r = T log mean exp(a / T), computed from the largest logit that counts."""
        counted_Gn = logits_Gn if sizes_Gn is None else logits_Gn.where(sizes_Gn > 0, -torch.inf)
        largest = counted_Gn.max()
        shifted_Gn = ((logits_Gn - largest) / found).clamp(max=0.0).exp()
        self.temperature = found
        self.reference = largest + found * mean_over_units(shifted_Gn, sizes_Gn)[0, 0].log()


def _moved(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)
