"""The weighting model's encoder of the LLM's own features (`weighting.encoder llm`).

One linear map of two pooled hidden states and the loss of a sample, as
model/passes/forward_outputs.py describes them. Cost: a product of [2 D + 1, width] per sample, not
per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dwm.weighting.standardize import standardize


class FeatureReader(nn.Module):
    """Maps features and losses of samples to [G, n, width]."""

    def __init__(self, feature_size: int, width: int) -> None:
        """Build the map; `feature_size` is D, the LLM's hidden size."""
        super().__init__()
        self.project = nn.Linear(2 * feature_size + 1, width)

    def forward(self, rows_GnK: Tensor, sizes_Gn: Tensor | None = None) -> Tensor:
        """Encode float32 [G, n, 2 D + 1]: final and early hidden state, token-mean loss.

        The hidden states are scaled to a root mean square of 1, since their scale depends on the
        model and grows during training. The loss is standardized inside the group, whose units
        count in proportion to `sizes_Gn`; None: all the same.
        """
        final_GnD, early_GnD = rows_GnK[..., :-1].chunk(2, dim=-1)
        parts = [F.rms_norm(hidden, hidden.shape[-1:]) for hidden in (final_GnD, early_GnD)]
        loss_Gn = standardize(rows_GnK[..., -1], sizes_Gn=sizes_Gn)
        if sizes_Gn is not None:
            # A unit without a counted token has no loss. Far below the mean, the 0 in its place
            # would reach the others through the attention across units.
            loss_Gn = torch.where(sizes_Gn > 0, loss_Gn, 0.0)
        return self.project(torch.cat([*parts, loss_Gn[..., None]], dim=-1))
