"""Batches that are read from indexed files, as a run reads them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch.distributed as dist

from benchmarks.settings import Settings
from megatron_dwm.config import DataConfig
from megatron_dwm.data import Batch, CorpusSource, Feed, Share, TrainingData
from megatron_dwm.preprocess.write.index_writer import write_index
from megatron_dwm.runtime import Runtime

_DOCUMENT_TOKENS = 700
_SEED = 5


class DiskBatches:
    """Batch after batch of a run's feed, which reads the next one while a step runs."""

    def __init__(self, feed: Feed) -> None:
        self._feed, self._step = feed, 0

    def next(self) -> Batch:
        """Returns this replica's rows of the next batch."""
        batch = self._feed.training(self._step)
        self._step += 1
        return batch


@contextmanager
def disk_batches(settings: Settings, runtime: Runtime, batches: int) -> Iterator[DiskBatches]:
    """Write documents of random tokens for a few steps; give the feed of `batches` steps of them.

    A collective call. Later batches are of later epochs, in another order.
    """
    with tempfile.TemporaryDirectory() as mine:
        folder = [mine]
        dist.broadcast_object_list(folder, src=0)
        prefix = Path(folder[0]) / "random_document"
        if runtime.is_main:
            _write(prefix, settings)
        runtime.barrier()
        config = DataConfig(train=[str(prefix)], sequence_length=settings.sequence)
        data = TrainingData(
            config,
            eod_id=0,
            seed=_SEED,
            num_samples=batches * settings.batch,
            cache_dir=prefix.parent / "cache",
        )
        share = Share(
            replicas=runtime.data_size,
            replica=runtime.data_rank,
            micro_batch_size=settings.micro_batch,
            micro_batches_multiple=1,
        )
        source = CorpusSource(data, settings.batch)
        yield DiskBatches(Feed(source, share, steps=batches, device=runtime.device))
        runtime.barrier()  # the main process removes the files


def _write(prefix: Path, settings: Settings) -> None:
    documents = max(8, 8 * settings.batch * settings.sequence // _DOCUMENT_TOKENS)
    dtype = np.uint16 if settings.vocab < 65_500 else np.int32  # as Megatron-Core's own files
    tokens = np.random.default_rng(_SEED).integers(1, settings.vocab, documents * _DOCUMENT_TOKENS)
    prefix.with_suffix(".bin").write_bytes(tokens.astype(dtype).tobytes())
    lengths = np.full(documents, _DOCUMENT_TOKENS, np.int32)
    write_index(prefix.with_suffix(".idx"), dtype, lambda: iter([lengths]))
