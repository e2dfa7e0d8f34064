"""Alignments of samples inside somebody else's training loop: docs/library.md.

MegatronProbe   a loop on Megatron-Core: any layout, its optimizers, its schedules
ModuleProbe     any torch.nn.Module of linear, embedding and norm layers; one process or DDP
"""

from megatron_dwm.library.megatron import MegatronProbe
from megatron_dwm.library.module import ModuleProbe
from megatron_dwm.library.results import SampleAlignments

__all__ = ["MegatronProbe", "ModuleProbe", "SampleAlignments"]
