"""Running mean and deviation of the LLM's features and losses, in place of a group's.

A weighting model without attention across samples sees one sample at a time. Statistics of the
batches before say where it lies among the others, so its logit does not depend on the group that it
happens to be in, nor on the micro-batch.

    mean  <- kept * mean + (1 - kept) * mean of the batch               of every feature
    var   <- kept * var + (1 - kept) * variance of the batch            mean over a state's features

The two hidden states and the loss have a deviation each. The first batch sets both. They belong to
the model: they are in its files and in checkpoints.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

# An update every ten steps: about a hundred steps.
_KEPT = 0.9
# A loss that hardly varies tells nothing; below this deviation (nats, or parts of a feature whose
# root mean square is 1) it is not blown up.
_SMALLEST = 1e-3


class RunningStatistics(nn.Module):
    """The statistics of rows [..., 2 D + 1]: final and early state, each of mean square 1; loss."""

    mean_K: Tensor
    variance_3: Tensor
    batches: Tensor

    def __init__(self, feature_size: int) -> None:
        """feature_size: D, the LLM's hidden size."""
        super().__init__()
        self._widths = [feature_size, feature_size, 1]
        self.register_buffer("mean_K", torch.zeros(sum(self._widths)))
        self.register_buffer("variance_3", torch.ones(3))
        self.register_buffer("batches", torch.zeros(()))

    def normalized(self, rows_GnK: Tensor) -> Tensor:
        """Returns (row - mean) / deviation; the rows themselves before the first batch."""
        deviation_3 = self.variance_3.sqrt().clamp(min=_SMALLEST)
        widths = torch.tensor(self._widths, device=rows_GnK.device)
        return (rows_GnK - self.mean_K) / deviation_3.repeat_interleave(widths)

    @torch.no_grad()
    def observe(self, rows_nK: Tensor, sizes_n: Tensor | None, group: dist.ProcessGroup) -> None:
        """Add a batch, of which this rank has rows [n, K] (collective over `group`).

        sizes_n: how much each row counts; None: all the same.
        """
        values_nK = rows_nK.double()
        sizes_n1 = torch.ones_like(values_nK[:, :1]) if sizes_n is None else sizes_n[:, None]
        sums = torch.cat([sizes_n1 * values_nK, sizes_n1 * values_nK.square(), sizes_n1], dim=1)
        sums = sums.sum(dim=0)
        dist.all_reduce(sums, group=group)
        width = rows_nK.shape[1]
        mean_K, square_K = sums[:width] / sums[-1], sums[width:-1] / sums[-1]
        parts = (square_K - mean_K.square()).clamp(min=0.0).split(self._widths)
        variance_3 = torch.stack([part.mean() for part in parts])
        kept = torch.where(self.batches > 0, _KEPT, 0.0).double()
        self.mean_K.copy_(torch.lerp(mean_K, self.mean_K.double(), kept))
        self.variance_3.copy_(torch.lerp(variance_3, self.variance_3.double(), kept))
        self.batches += 1
