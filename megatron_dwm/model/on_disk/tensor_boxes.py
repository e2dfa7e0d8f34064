"""Parts of tensors in Megatron-Core's `torch_dist` format, read by torch's own reader."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dwm.model.on_disk.saved_index import data_only


def read_box(
    folder: Path,
    index: Metadata,
    name: str,
    entry: TensorStorageMetadata,
    offsets: list[int],
    sizes: list[int],
) -> Tensor:
    """Returns the part of tensor `name` that begins at `offsets` and has these sizes, on the CPU.

    A read needs memory for the part and for the largest saved piece.
    """
    target = torch.empty(sizes, dtype=entry.properties.dtype)
    box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    items = create_read_items_for_chunk_list(name, entry, [box])
    assert sum(item.lengths.numel() for item in items) == target.numel(), name
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(index, is_coordinator=True)
    with data_only(folder):
        try:
            reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (AssertionError, AttributeError, EOFError, RuntimeError, TypeError) as error:
            raise CheckpointingException(f"{name}: {error}") from error
    return target


class _Into(DefaultLoadPlanner):
    """Copies what torch's reader reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Returns the part of the target that the item fills."""
        where = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(start, start + size) for start, size in where)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Does nothing: the part shares the target's memory."""
