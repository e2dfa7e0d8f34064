"""The batches of steps and updates, by number: this replica's rows, on its device.

A thread reads the next training batch while the step computes. Results do not depend on it: a batch
follows from its number alone, so resuming or skipping a step needs no special care. Cost: one
training batch of this replica in host memory.

A step may have a pool: `pool_batches` global batches, of which it trains on one, chosen from their
rows. Then this replica's part of the pool is what is read ahead, and the chosen rows are read by
their numbers, since they may come from the parts of other replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread

import torch

from megatron_dwm.data.batch import Batch
from megatron_dwm.data.sources import ChosenSource, CorpusSource, Origins, Source
from megatron_dwm.data.validation import ValidationSet
from megatron_dwm.model.passes.micro_batches import rows_of_replica


@dataclass(frozen=True, kw_only=True)
class Share:
    """This replica's part of every global batch, and the shape of its micro-batches.

    replicas, replica: number of replicas, and the number of this one.
    micro_batches_multiple: the number of micro-batches is a multiple of this (interleaved stages).
    """

    replicas: int
    replica: int
    micro_batch_size: int
    micro_batches_multiple: int = 1

    def rows(self, size: int) -> slice:
        """Returns this replica's rows of a batch of `size`; replicas have consecutive rows."""
        share = size // self.replicas
        return slice(self.replica * share, (self.replica + 1) * share)


class _ReadAhead(Thread):
    """Reads one batch. A daemon, so that a dead file system does not keep a failed run alive."""

    def __init__(self, step: int, read: Callable[[int], Batch]) -> None:
        super().__init__(name="feed", daemon=True)
        self.step, self._read = step, read
        self._batch: Batch | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Read the batch; what fails is kept for `result`."""
        try:
            self._batch = self._read(self.step)
        except BaseException as error:  # raised where the batch is asked for
            self._error = error

    def result(self) -> Batch:
        """Returns the batch once it is read; raises what its reading raised."""
        self.join()
        if self._error is not None:
            raise self._error
        assert self._batch is not None
        return self._batch


class Feed:
    """Batches of a run."""

    def __init__(
        self,
        training: Source,
        share: Share,
        *,
        steps: int,
        device: torch.device,
        pool_batches: int = 1,
        updates: Source | None = None,
        target: ValidationSet | None = None,
        passages: int = 0,
    ) -> None:
        """Open the feed.

        steps: number of batches of `training` that the run reads.
        pool_batches: global batches in one batch of `training`; above 1 that is the pool of a step.
        updates: batches of fresh updates; None if updates use the step's batch.
        target: passages for validation batches of at most `passages` rows each.
        """
        self._training, self._share, self._steps = training, share, steps
        self._device, self._updates, self._target = device, updates, target
        self.pool_batches = pool_batches
        self._chosen: tuple[int, ChosenSource] | None = None
        # A batch never has a row of the target twice.
        self.passages = passages if target is None else min(passages, target.num_rows)
        self._ahead: _ReadAhead | None = None

    @property
    def global_batch_size(self) -> int:
        """Samples that one step trains on, over all replicas."""
        return self._training.size // self.pool_batches

    def training(self, step: int) -> Batch:
        """Returns the batch of step `step` (from 0), or its pool; starts to read the next one."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.step == step:
            batch = ahead.result()
        else:
            batch = self._read_training(step)
        if step + 1 < self._steps:
            self._ahead = _ReadAhead(step + 1, self._read_training)
        return batch.to(self._device)

    def chosen(self, step: int, rows: Sequence[int]) -> Batch:
        """Returns this replica's part of a batch of rows chosen from the pool of step `step`.

        rows: numbers of the rows in the pool, for all replicas.
        """
        assert isinstance(self._training, CorpusSource), "pools are of the corpus"
        source = self._training.chosen(step, rows)
        self._chosen = (step, source)
        mine = self._share.rows(len(rows))
        return source.rows(mine.start, mine.stop).to(self._device)

    def update(self, number: int) -> Batch:
        """Returns the batch of weighting update `number` (from 0), if updates read their own."""
        assert self._updates is not None
        return self._rows(self._updates, number).to(self._device)

    def validation(self, number: int, *, halves: bool = False) -> Batch:
        """Returns this replica's passages of validation batch `number`.

        Rows without loss are added if replicas cannot have the same number of passages. The
        passages of the global batch do not depend on the layout.

        halves: the replica's even and odd rows are even and odd rows of the global batch.
        """
        assert self._target is not None
        share = self._share
        of_replica = rows_of_replica(
            self.passages,
            micro_batch_size=share.micro_batch_size,
            replicas=share.replicas,
            micro_batches_multiple=share.micro_batches_multiple,
            halves=halves,
        )
        size = of_replica * share.replicas
        batch = self._target.batch(number, self.passages, num_padding=size - self.passages)
        rows = share.rows(size)
        return batch.rows(rows.start, rows.stop).to(self._device)

    def origins(self, step: int) -> Origins:
        """Returns the origins of the global batch of step `step`; reads no token.

        With pools it is that of the last step whose rows were chosen.
        """
        if self.pool_batches == 1:
            return self._training.origins(step)
        assert self._chosen is not None and self._chosen[0] == step, step
        return self._chosen[1].origins()

    def first_rows(self, step: int, count: int) -> Batch:
        """Returns the first rows of the global batch of step `step`, at most `count`, on the CPU.

        With pools as in `origins`.
        """
        count = min(count, self.global_batch_size)
        if self.pool_batches == 1:
            return self._training.rows(step, 0, count)
        assert self._chosen is not None and self._chosen[0] == step, step
        return self._chosen[1].rows(0, count)

    def update_origins(self, number: int) -> Origins:
        """Returns the origins of the global batch of update `number`."""
        assert self._updates is not None
        return self._updates.origins(number)

    def sample_range(self, step: int) -> range:
        """Returns the numbers of the corpus samples in the batch or the pool of step `step`."""
        return self._training.sample_range(step)

    def _read_training(self, step: int) -> Batch:
        return self._rows(self._training, step)

    def _rows(self, source: Source, number: int) -> Batch:
        rows = self._share.rows(source.size)
        return source.rows(number, rows.start, rows.stop)
