"""What the ranks of the library's tests run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from megatron_dwm import ModuleProbe
from megatron_dwm.config import ParallelConfig
from megatron_dwm.runtime import bring_up
from tests.library.models import Model, sample_losses, text

ROWS = 6


def ddp_alignments() -> Tensor:
    """Returns the alignments of this process' samples, from a mean over all of them."""
    with bring_up(ParallelConfig(), seed=1):
        torch.manual_seed(3)
        model = DistributedDataParallel(Model().double())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        share = ROWS // dist.get_world_size()
        mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)

        def loss(number: int) -> Tensor:
            return sample_losses(model, text(number, ROWS)[mine]).mean()

        for number in range(5):
            optimizer.zero_grad()
            loss(number).backward()
            optimizer.step()
        probe = ModuleProbe(model, optimizer)
        probe.aim(lambda: loss(51).backward())
        with probe.attached() as alignments:
            loss(50).backward()
        return alignments.values_n
