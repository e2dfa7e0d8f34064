"""Which rank writes which part of which tensor: Megatron-Core's plan, made once per run.

A plan costs 10 to 30 milliseconds and several collective calls. It depends on the names and splits
of tensors, not on their values. So the first save makes the plan; later saves look up the current
tensors by name and offset, and serialize only what is not a tensor (Transformer Engine's scales).
"""

from __future__ import annotations

import io
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    StateDict,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from megatron_dwm.runtime import releases

BACKEND, VERSION = "torch_dist", 1
_PartKey = tuple[str, tuple[int, ...]]
"""name of a tensor or object, and offset of a part in it"""


@dataclass(frozen=True)
class RankFile:
    """The contents of this rank's file; `objects` are already serialized."""

    name: str
    objects: list[tuple[WriteItem, io.BytesIO]]
    tensors: list[tuple[WriteItem, Tensor]]


@dataclass(frozen=True)
class Planned:
    """A save that is ready to be written.

    index: written by rank 0 with the results of all ranks. common: everything that is no tensor.
    """

    files: list[RankFile]
    index: Metadata | None
    common: StateDict


class SavePlan:
    """The plan of all saves of a run; `of` is collective."""

    def __init__(self) -> None:
        self._first: Planned | None = None
        self._copies: dict[MetadataIndex, Tensor] = {}

    def of(self, state: ShardedStateDict, directory: Path) -> Planned:
        """Returns what this rank writes of a state into a directory."""
        if self._first is None:
            planned = _plan(state, directory)
            self._first = _without_tensors(planned)
            return planned
        return _by_plan(self._first, state)

    def copied(self, files: list[RankFile]) -> list[RankFile]:
        """Copy the tensors to host memory, into buffers that the next save uses again."""
        return [
            RankFile(file.name, file.objects, [(i, self._copy(i, t)) for i, t in file.tensors])
            for file in files
        ]

    def _copy(self, item: WriteItem, tensor: Tensor) -> Tensor:
        if item.index not in self._copies:
            # Page-locked memory: a GPU copies into it several times as fast.
            self._copies[item.index] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        return self._copies[item.index].copy_(tensor)


def _without_tensors(planned: Planned) -> Planned:
    """Replace the tensors by empty ones of the same shapes."""
    files = [
        RankFile(
            file.name, file.objects, [(item, tensor.to("meta")) for item, tensor in file.tensors]
        )
        for file in planned.files
    ]
    return Planned(files, planned.index, {})


def _by_plan(first: Planned, state: ShardedStateDict) -> Planned:
    """Fill the first plan with the current tensors.

    A plan belongs to one model and optimizer, whose tensors keep their names and shapes.
    """
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    mine = [value for value in nested_values(sharded) if is_main_replica(value.replica_id)]
    assert len(mine) == sum(len(file.objects) + len(file.tensors) for file in first.files)
    now = {_key_of(value): value.data for value in mine}
    files = []
    for file in first.files:
        objects = [(item, _bytes(now[_key(item.index)], old)) for item, old in file.objects]
        tensors = [
            (item, now[_key(item.index)].detach().view(old.shape)) for item, old in file.tensors
        ]
        files.append(RankFile(file.name, objects, tensors))
    return Planned(files, first.index, common)


def _bytes(value: Any, old: io.BytesIO) -> io.BytesIO:
    """Serialize an object as Megatron-Core does, in a list; None, the usual case, reuses `old`."""
    if value is None:
        return old
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream


def _key_of(value: ShardedBase) -> _PartKey:
    """Returns the name and offset of a part."""
    if isinstance(value, ShardedObject):
        return value.unique_key, ()
    assert isinstance(value, ShardedTensor)
    return value.key, tuple(value.global_offset)


def _key(index: MetadataIndex) -> _PartKey:
    return index.fqn, tuple(index.offset or ())


class _Planner(TorchDistSaveShardedStrategy):
    """Plans as its base class, but keeps the plan instead of passing it to other processes."""

    def __init__(self) -> None:
        super().__init__(BACKEND, VERSION, thread_count=1)
        self.writer: FileSystemWriterAsync | None = None
        self.index: Metadata | None = None

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, *_: Any
    ) -> Any:
        self.writer, self.index = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


def _plan(state: ShardedStateDict, directory: Path) -> Planned:
    """Make Megatron-Core's plan, which checks that the ranks' parts cover every tensor once."""
    planner = _Planner()
    # filesystem_async.py would start a process for a queue.
    filesystem_async._results_queue = queue.Queue()
    sharded, common = save_preprocess(state, validate_access_integrity=True)
    releases.plan_save(planner, sharded, directory)
    assert planner.writer is not None
    files = [
        RankFile(name, objects, tensors)
        for _, name, (objects, tensors) in planner.writer.write_buckets or []
    ]
    return Planned(files, planner.index, common)
