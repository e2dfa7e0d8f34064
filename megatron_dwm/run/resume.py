"""A run that goes on: what it may not have lost, and what it is told in vain."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_dwm.checkpoint.first_checkpoint import ever_had_checkpoint
from megatron_dwm.config import TrainingConfig, UserError
from megatron_dwm.run.recorded import recorded_steps
from megatron_dwm.runtime.warn import print_warning


def require_no_loss(run_dir: Path, training: TrainingConfig) -> None:
    """Raise UserError if a run without a whole checkpoint once had one; else say it begins again.

    training: as the run was started with.
    """
    lost = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*.damaged"))
    steps, noted = len(recorded_steps(run_dir)), ever_had_checkpoint(run_dir)
    had_one = _must_have_had_one(run_dir, training) if noted is None else noted
    if lost or had_one:
        why = "one was completed" if noted else f"{steps} steps are recorded"
        what = f"only {', '.join(lost)}" if lost else f"none, though {why}"
        raise UserError(
            f"run.dir: of the checkpoints of {run_dir} there is {what}; bring back a copy of one, "
            "or choose another run.dir to begin again"
        )
    if steps:
        print_warning(
            f"{run_dir} has no checkpoint{' and never had one' if noted is False else ''}: its "
            f"{steps} steps are trained again"
        )


def _must_have_had_one(run_dir: Path, training: TrainingConfig) -> bool:
    """Whether the steps of a run without a note show that a checkpoint was over and done with.

    One is begun after the first step that is taken from an interval's end on (in trouble it waits)
    and is over before the next step; beside training (checkpoint_async), before the next is begun.
    """
    taken, interval = recorded_steps(run_dir, ("train",)), training.checkpoint_interval_steps
    begun = 0
    for _ in range(2 if training.checkpoint_async else 1):
        due = (begun // interval + 1) * interval if interval else sys.maxsize
        begun = next((step for step in taken if step >= due), sys.maxsize)
    return bool(taken) and taken[-1] > begun


def say_what_has_no_effect(keys: list[str], checkpoint: Path) -> None:
    """keys: those that a resumed run has changed in vain."""
    for key in keys:
        print_warning(f"{key}: changed, with no effect: the run goes on from {checkpoint}")
