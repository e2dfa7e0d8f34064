"""Megatron-Core's distributed checkpoint in three parts, so that training can continue meanwhile.

    plan     collective   which rank writes which part of which tensor; optionally copy to the host
    write    local        write this rank's files, in this process; may run in a thread
    finish   collective   write the index; gather the size and checksum of every file

The format and the planning are Megatron-Core's. Its own writing forks two processes per rank and
talks to them through a third, and if a rank fails there (a full disk), the others wait forever.
Here failures of all ranks are gathered and raised on every rank as `SaveError`.

Loading first reads the index with a list of allowed classes. It makes `torch.load` refuse objects
while Megatron-Core's reader runs, because that passes `weights_only=False`
(torch/distributed/checkpoint/default_planner.py, `load_bytes`).
"""

from __future__ import annotations

import os
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
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dwm.checkpoint.manifest import FileRecord, record_file
from megatron_dwm.checkpoint.sharded_plan import BACKEND, VERSION, RankFile, SavePlan
from megatron_dwm.model.on_disk.saved_index import data_only, read_index
from megatron_dwm.runtime import releases

# Errors of a full or failing disk; torch's own writer turns OSError into RuntimeError.
DISK_ERRORS = (OSError, RuntimeError)


class SaveError(RuntimeError):
    """A checkpoint could not be written; raised on every rank, with the first rank's reason."""


class ShardedFiles:
    """One save of a sharded state into a directory."""

    def __init__(
        self,
        state: ShardedStateDict,
        directory: Path,
        plan: SavePlan,
        *,
        copy: bool,
    ) -> None:
        """Plan the save (collective). copy: copy to host memory, so that training can continue."""
        self._directory = directory
        self._planned = plan.of(state, directory)
        self._files, self._common = self._planned.files, self._planned.common
        if copy:
            self._files, self._common = plan.copied(self._files), _copied(self._common)
        self._writer = FileSystemWriterAsync(directory, thread_count=1)
        self._results: list[WriteResult] = []
        self._records: dict[str, FileRecord] = {}

    def write(self) -> None:
        """Write this rank's files. Raises OSError or RuntimeError."""
        for file in self._files:
            self._results += _written(self._writer, file, self._directory / file.name)
            self._records[file.name] = _forced_record(self._directory / file.name)
        if dist.get_rank() == 0:
            save_object(self._common, self._directory / COMMON_STATE_FNAME)

    def finish(self, failure: str | None) -> dict[str, FileRecord]:
        """Write the index (collective); returns the records of all files, complete on rank 0 only.

        failure: the error of this rank's `write`, if any. Raises SaveError if any rank failed.
        """
        parts = _everyones((failure, self._results, self._records))
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
        with releases.index_for_every_torch():
            self._writer.finish(self._planned.index, results)
        save_config(CheckpointingConfig(BACKEND, VERSION), str(self._directory))


def _written(writer: FileSystemWriterAsync, file: RankFile, path: Path) -> list[WriteResult]:
    """Write one file with Megatron-Core's function, which returns its results in a queue."""
    done: queue.Queue[Any] = queue.Queue()
    counted: queue.Queue[int] = queue.Queue()
    counted.put(0)
    tensors = [(item, _alone(tensor.cpu())) for item, tensor in file.tensors]
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    with _without_inner_checksums():
        FileSystemWriterAsync.write_preloaded_data(
            transforms, 0, (str(path), file.name, (file.objects, tensors)), done, counted, False
        )
    _, results = done.get_nowait()
    if isinstance(results, Exception):
        raise RuntimeError(str(results)) from results
    return results


@contextmanager
def _without_inner_checksums() -> Iterator[None]:
    """Save without torch.save's checksums, a third of its time; the manifest has its own."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _alone(tensor: Tensor) -> Tensor:
    """Copy a view of a larger tensor, since torch.save would write the whole storage."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _forced_record(path: Path) -> FileRecord:
    """Returns the record of a file, computed while the file is forced to the disk."""
    with path.open("rb") as stream, ThreadPoolExecutor(1) as pool:
        record = pool.submit(record_file, path)
        os.fsync(stream.fileno())
        return record.result()


def try_write(files: ShardedFiles) -> str | None:
    """Call `files.write`; returns the error, or None."""
    try:
        files.write()
    except DISK_ERRORS as error:
        return reason(error)
    return None


def save_object(value: Any, path: Path) -> None:
    """Save through a Python stream, whose errors name the disk's reason."""
    with path.open("wb") as stream:
        torch.save(value, stream)


def reason(error: BaseException) -> str:
    """Returns the disk's reason, from the causes of an error; torch's own message lacks it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


def agree(failure: str | None) -> None:
    """Raise SaveError on every rank if one of them has a failure (collective)."""
    _raise_first(_everyones(failure))


def _everyones(value: Any) -> list[Any]:
    """Gather the value of every rank, by rank (collective)."""
    values = [value]
    if dist.get_world_size() > 1:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def _raise_first(failures: list[str | None]) -> None:
    """Raise the first failure of a rank, if there is one."""
    for rank, text in enumerate(failures):
        if text is not None:
            where = f" (rank {rank})" if len(failures) > 1 else ""
            raise SaveError(f"{text}{where}")


def load_sharded(state: ShardedStateDict, directory: Path) -> StateDict:
    """Load the tensors of `state` from a directory that is not trusted (collective).

    Raises UserError if a file names code or cannot be read.
    """
    with data_only(directory), _weights_only():
        read_index(directory)
        return dist_checkpointing.load(state, directory)


def saved_names(directory: Path) -> set[str]:
    """Returns the names of the tensors in a directory that is not trusted.

    Raises UserError if its index names code.
    """
    with data_only(directory):
        return set(read_index(directory).state_dict_metadata)


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make torch.load refuse objects, whatever its caller passes."""
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


def _copied(value: Any) -> Any:
    """Copy nested lists and dicts and their tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
