"""The weighting model's encoder where the LLM itself has read the sample (`weighting.encoder llm`).

One linear map of what model/passes/forward_outputs.py describes: two pooled hidden states and the
loss. Cost: a product of [2 D + 1, width] a sample, not a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dwm.weighting.standardize import standardize


class FeatureReader(nn.Module):
    """Rows of features and losses -> [G, n, width]."""

    def __init__(self, feature_size: int, width: int) -> None:
        """feature_size: D, the LLM's hidden size."""
        super().__init__()
        self.project = nn.Linear(2 * feature_size + 1, width)

    def forward(self, rows_GnK: Tensor) -> Tensor:
        """float32 [G, n, 2 D + 1]: final and early hidden state, token-mean loss.

        The hidden states are brought to unit root mean square, since their scale differs from
        model to model and grows during training; the loss is standardized inside the group.
        """
        final_GnD, early_GnD = rows_GnK[..., :-1].chunk(2, dim=-1)
        parts = [F.rms_norm(hidden, hidden.shape[-1:]) for hidden in (final_GnD, early_GnD)]
        loss_Gn1 = standardize(rows_GnK[..., -1])[..., None]
        return self.project(torch.cat([*parts, loss_Gn1], dim=-1))
