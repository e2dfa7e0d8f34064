"""The sample indices of one pass over an indexed file, built once and mapped from a cache.

Megatron-Core's `GPTDataset` shuffles the documents of one pass, cuts them into samples and shuffles
those (megatron/core/datasets/gpt_dataset.py). Building costs time and memory in proportion to
documents plus samples; a cached pass is mapped, not read.

`GPTDataset` builds on rank 0 only, and another rank that meets a missing cache fails on the file.
So nothing is built while training runs: `on_first_rank` builds everything that a run needs while
the others wait, and a failure there is raised on every rank instead of leaving them waiting. A pass
is built in a folder of its own and then renamed, so that a killed run or a second run at the same
time never leaves half an index behind. The folder's name depends on everything that the index
depends on, the size and time of the data files included.
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
    """What `GPTDatasetConfig` asks of a tokenizer; it has no padding token, so none is masked."""

    eod: int
    vocab_size: int | None = None
    unique_identifiers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over a file in one shuffled order."""

    file: IndexedFile
    sequence_length: int
    seed: int

    @property
    def key(self) -> str:
        """Name of the pass in the cache."""
        parts = [megatron_version, str(self.sequence_length), str(self.seed)]
        for path in (self.file.bin_path, self.file.idx_path):
            stat = path.stat()
            parts += [str(path.resolve()), str(stat.st_size), str(stat.st_mtime_ns)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def ensure_pass(one_pass: Pass, indexed: IndexedDataset, eod_id: int, cache_dir: Path) -> None:
    """Build the indices of `one_pass` under `cache_dir` unless they are there.

    Raises:
        UserError: `cache_dir` cannot be written.
    """
    publish(
        cache_dir / one_pass.key,
        lambda folder: _gpt_dataset(one_pass, indexed, eod_id, folder),
    )


def open_pass(one_pass: Pass, indexed: IndexedDataset, eod_id: int, cache_dir: Path) -> GPTDataset:
    """The samples of `one_pass`, with its indices mapped from `cache_dir`.

    Raises:
        UserError: another rank built them where this one cannot see them.
    """
    return _gpt_dataset(one_pass, indexed, eod_id, published(cache_dir / one_pass.key))


def published(folder: Path) -> Path:
    """`folder`, which rank 0 has published.

    Raises:
        UserError: this rank cannot see it.
    """
    if not folder.is_dir():
        raise UserError(
            f"data.cache_dir {folder.parent} has no {folder.name} on this node: "
            "choose a directory on a file system that all nodes share"
        )
    return folder


def publish(target: Path, build: Callable[[Path], object]) -> None:
    """Let `build` fill a temporary folder and rename it to `target`, unless `target` exists.

    Raises:
        UserError: the parent folder of `target` cannot be written.
    """
    if target.is_dir():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(target, shared=True) as folder:
            build(folder)
    except OSError as error:
        raise UserError(
            f"data.cache_dir {target.parent} cannot be written ({error.strerror or error}): "
            "name a directory with free space that you may write to"
        ) from error


def on_first_rank(build: Callable[[], None]) -> None:
    """Run `build` on rank 0 while the other ranks wait; without a process group just run it.

    A collective call. What rank 0 raises is raised there, and as the same kind of error (a
    `UserError` or a `RuntimeError`) on all other ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        build()
        return
    failure: list[tuple[bool, str] | None] = [None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            build()
        except Exception as caught:  # handed to every rank, and raised below
            error = caught
            failure = [(isinstance(caught, UserError), str(caught))]
    dist.broadcast_object_list(failure, src=0)
    if error is not None:
        raise error
    if failure[0] is not None:
        is_users, message = failure[0]
        raise UserError(message) if is_users else RuntimeError(f"rank 0 failed: {message}")


def _gpt_dataset(one_pass: Pass, indexed: IndexedDataset, eod_id: int, folder: Path) -> GPTDataset:
    """Megatron's dataset of one pass; it writes its indices to `folder` or maps them from there."""
    name = one_pass.key
    config = GPTDatasetConfig(
        random_seed=one_pass.seed,
        sequence_length=one_pass.sequence_length,
        # A blend keeps the configuration from declaring itself a mock; it is not used.
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
