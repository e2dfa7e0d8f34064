"""The sample indices of one epoch of an indexed file, built once and mapped from a cache.

Megatron-Core's `GPTDataset` shuffles the documents of an epoch, cuts them into samples and shuffles
those (megatron/core/datasets/gpt_dataset.py). Building costs time and memory in proportion to
documents plus samples; a cached epoch is memory-mapped.

`GPTDataset` builds on rank 0 only, and another rank fails if the file is missing. So nothing is
built during training: `on_first_rank` builds everything that a run needs while the others wait, and
an error there is raised on every rank. An index is a folder that appears only when it is complete,
so neither a killed run nor two runs at the same time leave half an index. The folder's name depends
on everything that the index depends on, including size and time of the data files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_dwm.config.errors import UserError
from megatron_dwm.data.prefixes import IndexedFile
from megatron_dwm.files.atomic import new_folder


@dataclass(frozen=True)
class _DocumentEnd:
    """The attributes that `GPTDatasetConfig` reads of a tokenizer; no padding token is masked."""

    eod: int
    vocab_size: int | None = None
    unique_identifiers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch of a file, in one shuffled order."""

    file: IndexedFile
    sequence_length: int
    seed: int

    @property
    def key(self) -> str:
        """Name of the epoch in the cache."""
        parts = [megatron_version, str(self.sequence_length), str(self.seed)]
        for path in (self.file.bin_path, self.file.idx_path):
            stat = path.stat()
            parts += [str(path.resolve()), str(stat.st_size), str(stat.st_mtime_ns)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def build_epoch(epoch: Epoch, indexed: IndexedDataset, eod_id: int, cache_dir: Path) -> None:
    """Build the indices of `epoch` in `cache_dir` unless they exist.

    Raises:
        UserError: `cache_dir` cannot be written.
    """
    build_cached(
        cache_dir / epoch.key,
        lambda folder: _gpt_dataset(epoch, indexed, eod_id, folder),
    )


def open_epoch(epoch: Epoch, indexed: IndexedDataset, eod_id: int, cache_dir: Path) -> GPTDataset:
    """Returns the samples of `epoch`, with its indices mapped from `cache_dir`.

    Raises:
        UserError: rank 0 built them in a directory that this rank cannot see.
    """
    return _gpt_dataset(epoch, indexed, eod_id, cached(cache_dir / epoch.key))


def cached(folder: Path) -> Path:
    """Returns `folder`, which rank 0 has built in the cache.

    Raises:
        UserError: this rank cannot see it.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.cache_dir {folder.parent} has no {folder.name} on this node: "
            "choose a directory on a file system that all nodes share; the data has to have the "
            "same path and time of change on all nodes, too (copy it with cp -p)"
        )
    return folder


def build_cached(folder: Path, build: Callable[[Path], object]) -> None:
    """Let `build` fill `folder` of the cache, unless it exists.

    Raises:
        UserError: the cache cannot be written.
    """
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, shared=True) as partial:
            build(partial)
    except OSError as error:
        raise UserError(
            f"data.cache_dir {folder.parent} cannot be written ({error.strerror or error}): "
            "name a directory with free space that you may write to"
        ) from error


def on_first_rank(build: Callable[[], None]) -> None:
    """Run `build` on rank 0 while the other ranks wait; a collective call.

    Without a process group it only runs `build`. An error on rank 0 is also raised on all other
    ranks, as a `UserError` or a `RuntimeError`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        build()
        return
    failure: list[tuple[bool, str] | None] = [None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            build()
        except Exception as caught:  # sent to every rank, and raised below
            error = caught
            failure = [(isinstance(caught, UserError), str(caught))]
    dist.broadcast_object_list(failure, src=0)
    if error is not None:
        raise error
    if failure[0] is not None:
        is_users, message = failure[0]
        raise UserError(message) if is_users else RuntimeError(f"rank 0 failed: {message}")


def _gpt_dataset(epoch: Epoch, indexed: IndexedDataset, eod_id: int, folder: Path) -> GPTDataset:
    """Make Megatron's dataset of an epoch; it writes its indices to `folder` or maps them."""
    name = epoch.key
    config = GPTDatasetConfig(
        random_seed=epoch.seed,
        sequence_length=epoch.sequence_length,
        # Without a blend the configuration would be one of mock data; it is not used.
        blend=([name], None),
        split="1",
        path_to_cache=str(folder),
        tokenizer=_DocumentEnd(eod=eod_id),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = np.arange(len(indexed), dtype=np.int32)
    return GPTDataset(indexed, name, documents, None, Split.train, config)
