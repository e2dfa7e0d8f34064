"""Writes the checkpoints of a run: when they are complete, how many are kept, what may fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
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

    newest: the newest complete checkpoint of the run; None before the first.
    """

    def __init__(
        self,
        parts: Parts,
        run_dir: Path,
        config: TrainingConfig,
        fingerprint: dict[str, str],
        *,
        newest: Path | None,
        log: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """Prepare to save `parts`; `config` says how many are kept, and if a thread writes them."""
        self._log, self._begun_s = log, 0.0
        self.newest = newest
        self._parts, self._run_dir, self._config = parts, run_dir, config
        self._fingerprint, self._warn = fingerprint, warn
        self._pending: CheckpointSave | None = None
        self._plans: dict[str, SavePlan] = {}
        self._saved = self._position() if newest is not None else None

    @property
    def is_current(self) -> bool:
        """True if the newest checkpoint has the current state.

        Also true before the first step, when there is nothing to save and Adam has no state.
        """
        state = self._parts.state
        nothing_yet = state.step == state.skipped
        return self._pending is None and (nothing_yet or self._saved == self._position())

    def save(self, *, wait: bool = True) -> bool:
        """Write a checkpoint of the current state; if that fails, warn and return False.

        wait: the checkpoint is complete on return; without it, and with training.checkpoint_async,
        a thread may still write it.
        """
        self.finish()
        with ExitStack() as stack:
            for model in self._parts.models.values():
                stack.enter_context(model.offload.learning())
            return self._save(wait=wait)

    def _save(self, *, wait: bool) -> bool:
        background = self._config.checkpoint_async and not wait
        position, self._begun_s = self._position(), time.monotonic()
        try:
            self._pending = CheckpointSave(
                self._parts,
                self._run_dir,
                self._fingerprint,
                plans=self._plans,
                background=background,
            )
        except SaveError as error:
            self._refused(error)
            return False
        if background:
            self._saved = position
            return True
        if not self.finish():
            return False
        self._saved = position
        return True

    def finish_if_written(self) -> None:
        """Complete the pending checkpoint if every rank has written its part."""
        if self._pending is None:
            return
        writing = torch.tensor([int(not self._pending.is_written)], dtype=torch.int32)
        writing = writing.to(self._parts.runtime.device)
        if self._parts.runtime.world_size > 1:
            dist.all_reduce(writing, op=dist.ReduceOp.MAX)
        if not int(writing):
            self.finish()

    def finish(self) -> bool:
        """Wait for the pending checkpoint and complete it; False if that failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        try:
            self.newest = pending.finish()
        except SaveError as error:
            pending.discard()
            self._saved = None
            self._refused(error)
            return False
        if self._parts.runtime.is_main:
            self._log(self._line_about(self.newest))
            self._note_and_remove_old()
        return True

    def _line_about(self, checkpoint: Path) -> str:
        seconds = time.monotonic() - self._begun_s
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        return f"checkpoint {checkpoint.name}: {size / 1e6:,.1f} MB in {seconds:.1f} s"

    def _note_and_remove_old(self) -> None:
        try:
            note_checkpoint(self._run_dir)
        except OSError as error:  # the next checkpoint tries again
            self._warn(f"{self._run_dir} cannot be written: {error.strerror}")
        kept = self._config
        try:
            remove_old(self._run_dir, keep_last=kept.keep_last, keep_every=kept.keep_every)
        except OSError as error:
            self._warn(
                f"an old checkpoint in {self._run_dir} cannot be removed "
                f"({error.strerror or error}: {error.filename}); the next save tries again"
            )

    def _refused(self, error: SaveError) -> None:
        kept = f"{self.newest.name} is whole" if self.newest else "there is none yet"
        self._warn(
            f"the checkpoint at step {self._parts.state.step} in {self._run_dir} could "
            f"not be written: {error}; the one before it: {kept}; see to the disk or directory"
        )

    def _position(self) -> tuple[int, int, int]:
        state = self._parts.state
        return state.step, state.stage_updates, state.evaluated_step
