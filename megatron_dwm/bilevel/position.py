"""The part of a module in tensor parallelism: which tokens and heads its rank sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

# Megatron-Core's names of the norms over this rank's heads (transformer/attention.py).
_NORMS_OF_HEADS = ("q_layernorm", "k_layernorm")


@dataclass(frozen=True)
class TensorParallelPosition:
    """A module's part in tensor parallelism. group: the tensor-parallel group.

    scaled_over: the ranks that share the scales of emulated FP8; None for one process.
    sees_part: this rank's input is its own part of the sequence or of the heads, not a copy of
    the input of the other tensor-parallel ranks.
    """

    sequence_parallel: bool
    tensor_rank: int
    group: dist.ProcessGroup | None
    sees_part: bool
    scaled_over: dist.ProcessGroup | None = None

    def whole(self, tensor_SBD: Tensor) -> Tensor:
        """Returns the whole sequence, [S, B, D]; gathers it under sequence parallelism."""
        if not self.sequence_parallel:
            return tensor_SBD
        assert self.group is not None
        part_SBD = tensor_SBD.contiguous()
        whole_SBD = part_SBD.new_empty(part_SBD.shape[0] * self.group.size(), *part_SBD.shape[1:])
        dist.all_gather_into_tensor(whole_SBD, part_SBD, group=self.group)
        return whole_SBD

    def first_of(self, part_SBD: Tensor) -> int:
        """Returns the position in the row of the first token of a norm's input.

        A norm of heads, whose input is [S, B, heads, D], sees the whole sequence.
        """
        has_part = self.sequence_parallel and part_SBD.dim() == 3
        return self.tensor_rank * len(part_SBD) if has_part else 0


def position_of(
    name: str,
    *,
    sequence_parallel: bool,
    tensor_rank: int,
    group: dist.ProcessGroup | None,
    scaled_over: dist.ProcessGroup | None = None,
) -> TensorParallelPosition:
    """Returns the position of the module with this dotted name in the model."""
    of_heads = name.rsplit(".", 1)[-1] in _NORMS_OF_HEADS
    return TensorParallelPosition(
        sequence_parallel=sequence_parallel,
        tensor_rank=tensor_rank,
        group=group,
        sees_part=sequence_parallel or of_heads,
        scaled_over=scaled_over,
    )
