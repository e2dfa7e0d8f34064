"""The weighting model's encoder of the LLM's own features (`weighting.encoder llm`).

One linear map of two pooled hidden states and the loss of a sample, as
model/passes/forward_outputs.py describes them. Cost: a product of [2 D + 1, width] per sample, not
per token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dwm.weighting.running_statistics import RunningStatistics
from megatron_dwm.weighting.standardize import standardize


class FeatureReader(nn.Module):
    """Maps features and losses of samples to [G, n, width]."""

    def __init__(self, feature_size: int, width: int, *, remembers: bool = False) -> None:
        """Build the map; `feature_size` is D, the LLM's hidden size.

        remembers: rows are compared with running statistics, not with their group.
        """
        super().__init__()
        self.project = nn.Linear(2 * feature_size + 1, width)
        self.statistics = RunningStatistics(feature_size) if remembers else None

    def forward(self, rows_GnK: Tensor, sizes_Gn: Tensor | None = None) -> Tensor:
        """Encode float32 [G, n, 2 D + 1]: final and early hidden state, token-mean loss.

        The hidden states are scaled to a root mean square of 1, since their scale depends on the
        model and grows during training. The loss is standardized inside the group, whose units
        count in proportion to `sizes_Gn`; None: all the same. With running statistics both are
        standardized by these.
        """
        if self.statistics is not None:
            scaled_GnK = self.statistics.normalized(_scaled(rows_GnK))
            if sizes_Gn is not None:  # a unit without a counted token has no loss
                loss_Gn1 = scaled_GnK[..., -1:].where(sizes_Gn[..., None] > 0, 0.0)
                scaled_GnK = torch.cat([scaled_GnK[..., :-1], loss_Gn1], dim=-1)
            return self.project(scaled_GnK)
        scaled_GnK = _scaled(rows_GnK)
        loss_Gn = standardize(rows_GnK[..., -1], sizes_Gn=sizes_Gn)
        if sizes_Gn is not None:
            # A unit without a counted token has no loss. Far below the mean, the 0 in its place
            # would reach the others through the attention across units.
            loss_Gn = torch.where(sizes_Gn > 0, loss_Gn, 0.0)
        return self.project(torch.cat([scaled_GnK[..., :-1], loss_Gn[..., None]], dim=-1))

    def observe(self, rows_nK: Tensor, sizes_n: Tensor | None, group: dist.ProcessGroup) -> None:
        """Add a batch's rows to the running statistics, if there are any (collective then)."""
        if self.statistics is not None:
            self.statistics.observe(_scaled(rows_nK), sizes_n, group)


def _scaled(rows_GnK: Tensor) -> Tensor:
    """Returns the rows with both hidden states scaled to a root mean square of 1."""
    final_GnD, early_GnD = rows_GnK[..., :-1].chunk(2, dim=-1)
    parts = [F.rms_norm(hidden, hidden.shape[-1:]) for hidden in (final_GnD, early_GnD)]
    return torch.cat([*parts, rows_GnK[..., -1:]], dim=-1)
