"""When a run's checkpoints are finished, how many are kept, and what a failed one means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dwm.checkpoint.first_checkpoint import note_checkpoint
from megatron_dwm.checkpoint.manifest import remove_old
from megatron_dwm.checkpoint.parts import Parts
from megatron_dwm.checkpoint.save import CheckpointSave
from megatron_dwm.checkpoint.sharded_files import SaveError
from megatron_dwm.checkpoint.sharded_plan import SavePlan
from megatron_dwm.config import TrainingConfig


class Saver:
    """Writes checkpoints, one at a time; every method is collective.

    newest: the newest whole checkpoint of the run; None before the first.
    """

    def __init__(
        self,
        parts: Parts,
        run_dir: Path,
        config: TrainingConfig,
        fingerprint: dict[str, str],
        *,
        newest: Path | None,
        warn: Callable[[str], None],
    ) -> None:
        """config: how many checkpoints are kept, and whether they are written beside training."""
        self.newest = newest
        self._parts, self._run_dir, self._config = parts, run_dir, config
        self._fingerprint, self._warn = fingerprint, warn
        self._under_way: CheckpointSave | None = None
        self._plan = SavePlan()
        self._saved = self._mark() if newest is not None else None

    @property
    def is_current(self) -> bool:
        """True if the newest checkpoint has everything up to now.

        Before the first step there is nothing to keep, and Adam has no state to be saved.
        """
        state = self._parts.state
        nothing_yet = state.step == state.skipped
        return self._under_way is None and (nothing_yet or self._saved == self._mark())

    def save(self, *, wait: bool = True) -> bool:
        """Write a checkpoint of this moment; False, and a warning, if the disk refuses it.

        wait: it is to be whole when this returns; otherwise, with training.checkpoint_async, as
        soon as a thread has written it.
        """
        self.finish()
        background = self._config.checkpoint_async and not wait
        mark = self._mark()
        try:
            self._under_way = CheckpointSave(
                self._parts,
                self._run_dir,
                self._fingerprint,
                plan=self._plan,
                background=background,
            )
        except SaveError as error:
            self._refused(error)
            return False
        if background:
            self._saved = mark
            return True
        if not self.finish():
            return False
        self._saved = mark
        return True

    def finish_if_written(self) -> None:
        """Give a checkpoint its name once every rank has written its part."""
        if self._under_way is None:
            return
        writing = torch.tensor([int(not self._under_way.is_written)], dtype=torch.int32)
        writing = writing.to(self._parts.runtime.device)
        if self._parts.runtime.world_size > 1:
            dist.all_reduce(writing, op=dist.ReduceOp.MAX)
        if not int(writing):
            self.finish()

    def finish(self) -> bool:
        """Wait for the checkpoint under way; False if it failed."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return True
        try:
            self.newest = under_way.finish()
        except SaveError as error:
            under_way.discard()
            self._saved = None
            self._refused(error)
            return False
        if self._parts.runtime.is_main:
            self._after_a_whole_one()
        return True

    def _after_a_whole_one(self) -> None:
        try:
            note_checkpoint(self._run_dir)
        except OSError as error:  # noted with the next one
            self._warn(f"{self._run_dir} cannot be written: {error.strerror}")
        kept = self._config
        remove_old(self._run_dir, keep_last=kept.keep_last, keep_every=kept.keep_every)

    def _refused(self, error: SaveError) -> None:
        kept = f"{self.newest.name} is whole" if self.newest else "there is none yet"
        self._warn(
            f"the checkpoint at step {self._parts.state.step} in {self._run_dir} could "
            f"not be written: {error}; the one before it: {kept}; see to the disk or directory"
        )

    def _mark(self) -> tuple[int, int, int]:
        state = self._parts.state
        return state.step, state.stage_updates, state.evaluated_step
