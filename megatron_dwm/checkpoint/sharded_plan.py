"""Which rank writes which part of which tensor: Megatron-Core's plan, made once for a run's saves.

Making it costs 10 to 30 milliseconds and several collective calls, and it depends on what the
tensors are called and how they are cut, not on their values. So the first save makes it, and later
ones look up the tensors of their moment by name and offset, and serialise what is not a tensor
(Transformer Engine's scales) anew.
"""

from __future__ import annotations

import io
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
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
from megatron.core.dist_checkpointing.strategies.base import (
    StrategyAction,
    get_default_strategy,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

BACKEND, VERSION = "torch_dist", 1
_Place = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class RankFile:
    """What this rank writes into its file. objects: already serialised."""

    name: str
    objects: list[tuple[WriteItem, io.BytesIO]]
    tensors: list[tuple[WriteItem, Tensor]]


@dataclass(frozen=True)
class Planned:
    """A save that only has to be written. index: what rank 0 writes besides, before its results.

    common: what is not a tensor.
    """

    files: list[RankFile]
    index: Metadata | None
    common: StateDict


class SavePlan:
    """The plan of all saves of one run; `of` is collective."""

    def __init__(self) -> None:
        self._first: Planned | None = None
        self._copies: dict[MetadataIndex, Tensor] = {}

    def of(self, state: ShardedStateDict, directory: Path) -> Planned:
        """What to write of a state into a directory."""
        if self._first is None:
            planned = _plan(state, directory)
            self._first = _without_tensors(planned)
            return planned
        return _by_plan(self._first, state)

    def copied(self, files: list[RankFile]) -> list[RankFile]:
        """The same with copies in host memory, which are used again by the next save."""
        return [
            RankFile(file.name, file.objects, [(i, self._copy(i, t)) for i, t in file.tensors])
            for file in files
        ]

    def _copy(self, item: WriteItem, tensor: Tensor) -> Tensor:
        if item.index not in self._copies:
            # Page-locked beside a GPU, which copies into it several times as fast.
            self._copies[item.index] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        return self._copies[item.index].copy_(tensor)


def _without_tensors(planned: Planned) -> Planned:
    """With empty tensors of the same shapes in place of a moment's."""
    files = [
        RankFile(
            file.name, file.objects, [(item, tensor.to("meta")) for item, tensor in file.tensors]
        )
        for file in planned.files
    ]
    return Planned(files, planned.index, {})


def _by_plan(first: Planned, state: ShardedStateDict) -> Planned:
    """The tensors of this moment in the places of the first plan.

    A plan is for one model and optimizer, whose tensors keep their names and shapes.
    """
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    mine = [value for value in nested_values(sharded) if is_main_replica(value.replica_id)]
    assert len(mine) == sum(len(file.objects) + len(file.tensors) for file in first.files)
    now = {_place_of(value): value.data for value in mine}
    files = []
    for file in first.files:
        objects = [(item, _bytes(now[_place(item.index)], old)) for item, old in file.objects]
        tensors = [
            (item, now[_place(item.index)].detach().view(old.shape)) for item, old in file.tensors
        ]
        files.append(RankFile(file.name, objects, tensors))
    return Planned(files, first.index, common)


def _bytes(value: Any, old: io.BytesIO) -> io.BytesIO:
    """As Megatron-Core serialises an object: in a list. `old` has nothing, as most have."""
    if value is None:
        return old
    stream = io.BytesIO()
    torch.save([value], stream)
    return stream


def _place_of(value: ShardedBase) -> _Place:
    """Where in the checkpoint a part belongs: its name and offset."""
    if isinstance(value, ShardedObject):
        return value.unique_key, ()
    assert isinstance(value, ShardedTensor)
    return value.key, tuple(value.global_offset)


def _place(index: MetadataIndex) -> _Place:
    return index.fqn, tuple(index.offset or ())


class _KeptCommon(TorchCommonSaveStrategy):
    """Keeps what is not a tensor, instead of writing it while the others go on."""

    def __init__(self) -> None:
        super().__init__("torch", VERSION)
        self.kept: StateDict = {}

    def save_common(self, common_state_dict: StateDict, checkpoint_dir: str | Path) -> None:
        self.kept = common_state_dict


class _Planner(TorchDistSaveShardedStrategy):
    """Plans as its base class; what it would hand to other processes is kept here."""

    def __init__(self) -> None:
        super().__init__(BACKEND, VERSION, thread_count=1)
        self.writer: FileSystemWriterAsync | None = None
        self.index: Metadata | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        self.writer, self.index = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


def _plan(state: ShardedStateDict, directory: Path) -> Planned:
    """Megatron-Core's plan, which checks that the ranks' parts cover every tensor once."""
    planner, common = _Planner(), _KeptCommon()
    # Answers filesystem_async.py, `_get_write_results_queue`: a process for a queue.
    filesystem_async._results_queue = queue.Queue()
    with _common_strategy(common):
        dist_checkpointing.save(
            state,
            str(directory),
            planner,
            validate_access_integrity=True,
            async_sharded_save=True,
        )
    assert planner.writer is not None
    files = [
        RankFile(name, objects, tensors)
        for _, name, (objects, tensors) in planner.writer.write_buckets or []
    ]
    return Planned(files, planner.index, common.kept)


@contextmanager
def _common_strategy(strategy: TorchCommonSaveStrategy) -> Iterator[None]:
    """dist_checkpointing.save takes this one from its registry only."""
    before = get_default_strategy(StrategyAction.SAVE_COMMON, "torch", VERSION)
    register_default_strategy(StrategyAction.SAVE_COMMON, "torch", VERSION, strategy)
    try:
        yield
    finally:
        register_default_strategy(StrategyAction.SAVE_COMMON, "torch", VERSION, before)
