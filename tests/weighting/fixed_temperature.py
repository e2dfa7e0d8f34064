"""Weights at temperatures that are held, to compare derivatives with.

Where the bound on the effective sample size is active, an update takes the derivative of the
weights at a fixed temperature (METHOD.md, section 6). Here every group's temperature is found once,
in double precision, and kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dwm.weighting.model import WeightingModel


class FixedTemperature:
    """The weights of a model, by the temperatures that its groups have when this is made."""

    def __init__(
        self, model: WeightingModel, pooled: Callable[[], Tensor], *, bound: float, group: int
    ) -> None:
        """pooled: the encoder's vectors of all samples. group: samples in a weighting group."""
        self._model, self._pooled, self._group = model, pooled, group
        self.temperature_G = temperature_by_root(self._logits(), bound)

    @torch.no_grad()
    def weights(self) -> Tensor:
        """[n]: of the model as it is now."""
        shares_Gn = torch.softmax(self._logits() / self.temperature_G[:, None], dim=-1)
        return (shares_Gn * self._group).flatten()

    @torch.no_grad()
    def _logits(self) -> Tensor:
        pooled_nD = self._pooled()
        return self._model.logits(pooled_nD.view(-1, self._group, pooled_nD.shape[-1]))


def temperature_by_root(logits_Gn: Tensor, bound: float) -> Tensor:
    """[G]: 1 where the bound holds, else where the effective sample size meets it."""
    return torch.tensor([_root(row_n, bound) for row_n in logits_Gn], dtype=torch.float64)


def _root(logits_n: Tensor, bound: float) -> float:
    def is_held(temperature: float) -> bool:
        shares_n = torch.softmax(logits_n.double() / temperature, dim=-1)
        return float(1.0 / (len(logits_n) * shares_n.square().sum())) >= bound

    low, high = 1.0, 1.0 if is_held(1.0) else 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if is_held(middle) else (middle, high)
    return high
