"""Which checkpoint a resumed run goes on from: the newest one that is whole.

Every file of the candidates is read once, shared out over the ranks, so it costs what the load
that follows costs. A damaged checkpoint is named, set aside under another name, and the one before
it is tried.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from megatron_dwm.config import TrainingConfig, UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.runtime import Runtime, rank_from_environment
from megatron_dwm.training.first_checkpoint import ever_had_checkpoint
from megatron_dwm.training.manifest import (
    checkpoint_dir,
    find_damage,
    list_checkpoints,
    read_manifest,
    set_aside,
    tidy,
)
from megatron_dwm.training.recorded import recorded_steps


def newest_whole_checkpoint(run_dir: Path, runtime: Runtime) -> Path | None:
    """The newest whole checkpoint, or None where the run has none (collective).

    Raises UserError if there are checkpoints, but none is whole.
    """
    if runtime.is_main:
        tidy(run_dir)
    runtime.barrier()
    found = list_checkpoints(run_dir)
    damaged: list[str] = []
    for directory in reversed(found):
        damage = _damage(directory, runtime)
        if damage is None:
            return directory
        damaged.append(f"{directory.name} ({damage})")
        if runtime.is_main:
            _say(directory, damage)
            set_aside(directory)
        runtime.barrier()
    if damaged:
        raise UserError(
            f"run.dir: no checkpoint in {run_dir} is whole: {', '.join(damaged)}; bring back a "
            "copy, or choose another run.dir to begin again"
        )
    return None


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


def _damage(directory: Path, runtime: Runtime) -> str | None:
    """What is wrong with a checkpoint, if anything; the same on every rank (collective)."""
    try:
        manifest = read_manifest(directory)
        files = sorted(manifest.files.items())
        mine = find_damage(directory, files[runtime.rank :: runtime.world_size])
        right = checkpoint_dir(directory.parent.parent, manifest.state).name
        if directory.name != right:
            mine = f"it is {right} by its manifest, under another name"
    except ValueError as error:
        mine = str(error)
    everyones: list[str | None] = [mine]
    if runtime.world_size > 1:
        everyones = [None] * runtime.world_size
        dist.all_gather_object(everyones, mine)
    return next((text for text in everyones if text is not None), None)


def _say(directory: Path, damage: str) -> None:
    print_warning(
        f"checkpoint {directory} is damaged: {damage}; it is set aside as "
        f"{directory.name}.damaged and the one before it is next"
    )


def print_warning(text: str) -> None:
    """A warning of the main process, before there is a progress to say it beside."""
    if rank_from_environment() == 0:
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)
