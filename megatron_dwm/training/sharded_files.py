"""Megatron-Core's distributed checkpoint in three parts, so that writing can go on beside training.

    plan     collective   who writes which part of which tensor; optionally a copy to host memory
    write    alone        this rank's files, in this process; may run in a thread
    finish   collective   the index, and the size and checksum of every file

The format and the planning are Megatron-Core's. Its own writing forks two processes a rank and
talks to them through a third; and a rank that fails there (a full disk) leaves the others waiting.
Here every failure is gathered, and raised on every rank as `SaveError`.

Loading reads the index with a list of allowed classes first, and makes `torch.load` refuse objects
for as long as Megatron-Core's reader runs: it asks for `weights_only=False`
(torch/distributed/checkpoint/default_planner.py, `load_bytes`).
"""

from __future__ import annotations

import os
import pickle
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    StrategyAction,
    get_default_strategy,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.common import (
    COMMON_STATE_FNAME,
    TorchCommonSaveStrategy,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dwm.config import UserError
from megatron_dwm.model.saved_index import read_index
from megatron_dwm.training.manifest import FileRecord, record_file

_BACKEND, _VERSION = "torch_dist", 1
# What a full or failing disk raises; torch's own writer makes a RuntimeError of it.
DISK_ERRORS = (OSError, RuntimeError)


class SaveError(RuntimeError):
    """A checkpoint could not be written; raised on every rank, with the first rank's reason."""


class _KeptCommon(TorchCommonSaveStrategy):
    """Keeps what is not a tensor for `write`, instead of writing it while the others go on."""

    def __init__(self) -> None:
        super().__init__("torch", _VERSION)
        self.kept: StateDict = {}

    def save_common(self, common_state_dict: StateDict, checkpoint_dir: str | Path) -> None:
        self.kept = common_state_dict


class _Planner(TorchDistSaveShardedStrategy):
    """Plans as its base class; what it would hand to other processes is kept here."""

    def __init__(self) -> None:
        super().__init__(_BACKEND, _VERSION, thread_count=1)
        self.writer: filesystem_async.FileSystemWriterAsync | None = None
        self.index: Metadata | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        self.writer, self.index = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


class ShardedFiles:
    """One save of a sharded state into a directory."""

    def __init__(
        self, state: ShardedStateDict, directory: Path, *, copy: bool, check: bool
    ) -> None:
        """Plan (collective). copy: also take a copy in host memory, that training may go on.

        check: that the ranks' parts cover every tensor once; a layout need not be checked twice.
        """
        self._directory = directory
        self._planner, common = _Planner(), _KeptCommon()
        # Answers filesystem_async.py, `_get_write_results_queue`: a process for a queue.
        filesystem_async._results_queue = queue.Queue()
        with _common_strategy(common):
            dist_checkpointing.save(
                state,
                str(directory),
                self._planner,
                validate_access_integrity=check,
                async_sharded_save=True,
            )
        self._common = _copied(common.kept) if copy else common.kept
        assert self._planner.writer is not None
        self._buckets = self._planner.writer.preload_tensors(
            self._planner.writer.write_buckets or [], non_blocking=False
        )
        if copy:
            self._buckets = [_copied_bucket(bucket) for bucket in self._buckets]
        self._results: list[WriteResult] = []
        self._records: dict[str, FileRecord] = {}

    def write(self) -> None:
        """Write this rank's files. Raises OSError or RuntimeError."""
        writer = self._planner.writer
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        for number, bucket in enumerate(self._buckets):
            done: queue.Queue[Any] = queue.Queue()
            counted: queue.Queue[int] = queue.Queue()
            counted.put(number)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, number, bucket, done, counted, False
            )
            _, results = done.get_nowait()
            if isinstance(results, Exception):
                raise RuntimeError(str(results)) from results
            self._results += results
            self._records[bucket[1]] = _forced_record(self._directory / bucket[1])
        if dist.get_rank() == 0:
            save_object(self._common, self._directory / COMMON_STATE_FNAME)

    def finish(self, failure: str | None) -> dict[str, FileRecord]:
        """The index (collective). The records of all files come back, on rank 0 only.

        failure: what went wrong in this rank's `write`. Raises SaveError if anything did anywhere.
        """
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (failure, self._results, self._records))
        _raise_first([part[0] for part in parts])
        records = {name: record for part in parts for name, record in part[2].items()}
        failure = None
        if dist.get_rank() == 0:
            try:
                self._write_index([part[1] for part in parts])
                for name in (".metadata", "metadata.json", COMMON_STATE_FNAME):
                    records[name] = record_file(self._directory / name)
            except DISK_ERRORS as error:
                failure = reason(error)
        agree(failure)
        return records

    def _write_index(self, results: list[list[WriteResult]]) -> None:
        assert self._planner.writer is not None
        self._planner.writer.finish(self._planner.index, results)
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(self._directory))


def _forced_record(path: Path) -> FileRecord:
    """The record of a file, found while the disk takes it."""
    with path.open("rb") as stream, ThreadPoolExecutor(1) as pool:
        record = pool.submit(record_file, path)
        os.fsync(stream.fileno())
        return record.result()


def try_write(files: ShardedFiles) -> str | None:
    """`files.write`; what went wrong, or None."""
    try:
        files.write()
    except DISK_ERRORS as error:
        return reason(error)
    return None


def save_object(value: Any, path: Path) -> None:
    """torch.save through a stream of Python's, which says what the disk says."""
    with path.open("wb") as stream:
        torch.save(value, stream)


def reason(error: BaseException) -> str:
    """What the disk said; torch's own writer speaks of positions in its archive instead."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


def agree(failure: str | None) -> None:
    """Raise SaveError on every rank if one of them has a failure (collective)."""
    failures = [failure]
    if dist.get_world_size() > 1:
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    _raise_first(failures)


def _raise_first(failures: list[str | None]) -> None:
    """Raise the first failure of a rank, if there is one."""
    for rank, text in enumerate(failures):
        if text is not None:
            where = f" (rank {rank})" if len(failures) > 1 else ""
            raise SaveError(f"{text}{where}")


def load_sharded(state: ShardedStateDict, directory: Path) -> StateDict:
    """What `state` asks for, from a directory that need not be trusted (collective).

    Raises UserError if a file in it names code.
    """
    with data_only(directory), _weights_only():
        read_index(directory)
        return dist_checkpointing.load(state, str(directory))


def saved_names(directory: Path) -> set[str]:
    """The names of the tensors in a directory that need not be trusted.

    Raises UserError if its index names code.
    """
    with data_only(directory):
        return set(read_index(directory).state_dict_metadata)


@contextmanager
def data_only(path: Path) -> Iterator[None]:
    """A restricted unpickler's refusal becomes one line that names `path`."""
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")[:200]
        raise UserError(
            f"{path}: it holds something else than data, and nothing of it was run; take a "
            f"checkpoint from whom you trust ({reason})"
        ) from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """torch.load refuses objects, whatever its caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _common_strategy(strategy: TorchCommonSaveStrategy) -> Iterator[None]:
    """dist_checkpointing.save takes this one from its registry only."""
    before = get_default_strategy(StrategyAction.SAVE_COMMON, "torch", _VERSION)
    register_default_strategy(StrategyAction.SAVE_COMMON, "torch", _VERSION, strategy)
    try:
        yield
    finally:
        register_default_strategy(StrategyAction.SAVE_COMMON, "torch", _VERSION, before)


def _copied(value: Any) -> Any:
    """Nested lists and dicts with the tensors copied."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def _copied_bucket(bucket: Any) -> Any:
    """Tensors on the CPU are training's own: it goes on to change them."""
    path, name, (texts, tensors) = bucket
    return path, name, (texts, [(item, tensor.clone()) for item, tensor in tensors])
