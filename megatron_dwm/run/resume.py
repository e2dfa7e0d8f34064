"""Checks of a resumed run: lost checkpoints, and changed keys without effect."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from megatron_dwm.checkpoint.first_checkpoint import ever_had_checkpoint
from megatron_dwm.config import TrainingConfig, UserError
from megatron_dwm.run.recorded import recorded_steps
from megatron_dwm.runtime.warn import print_warning
from megatron_dwm.training.optimizer import learning_rate_of


def require_no_loss(run_dir: Path, training: TrainingConfig) -> None:
    """Raise UserError if a run without a complete checkpoint once had one; else warn and continue.

    training: the section with which the run was started.
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
    """True if the recorded steps of a run without a note show that it had completed a checkpoint.

    A checkpoint begins after the first step taken at or after the end of an interval (it waits
    while steps are skipped). It is complete before the next step, or with checkpoint_async before
    the next checkpoint begins.
    """
    taken, interval = recorded_steps(run_dir, ("train",)), training.checkpoint_interval_steps
    begun = 0
    for _ in range(2 if training.checkpoint_async else 1):
        due = (begun // interval + 1) * interval if interval else sys.maxsize
        begun = next((step for step in taken if step >= due), sys.maxsize)
    return bool(taken) and taken[-1] > begun


def warn_of_keys_without_effect(keys: list[str], checkpoint: Path) -> None:
    """Print a warning for each changed key that has no effect on a resumed run."""
    for key in keys:
        print_warning(f"{key}: changed, with no effect: the run continues from {checkpoint}")


def warn_of_another_rate(before: TrainingConfig, now: TrainingConfig, step: int) -> None:
    """Print a warning if the learning rate of the next step jumps, as another length makes it."""
    was, will = learning_rate_of(before, step), learning_rate_of(now, step)
    if not math.isclose(was, will, rel_tol=1e-6):
        print_warning(
            f"the learning rate of step {step} is {will:.2e}; with the settings before "
            f"it would be {was:.2e} (training.steps {before.steps}, now {now.steps}; it follows "
            "from steps, learning_rate and min_learning_rate_fraction)"
        )
