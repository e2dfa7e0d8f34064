"""Which checkpoint a resumed run goes on from: the newest one that is whole.

Every file of the candidates is read once, shared out over the ranks, so it costs what the load
that follows costs. A damaged checkpoint is named, set aside under another name, and the one before
it is tried.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from megatron_dwm.config import UserError
from megatron_dwm.runtime import Runtime
from megatron_dwm.training.manifest import (
    find_damage,
    list_checkpoints,
    read_manifest,
    set_aside,
    tidy,
)


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


def _damage(directory: Path, runtime: Runtime) -> str | None:
    """What is wrong with a checkpoint, if anything; the same on every rank (collective)."""
    try:
        files = sorted(read_manifest(directory).files.items())
        mine = find_damage(directory, files[runtime.rank :: runtime.world_size])
    except ValueError as error:
        mine = str(error)
    everyones: list[str | None] = [mine]
    if runtime.world_size > 1:
        everyones = [None] * runtime.world_size
        dist.all_gather_object(everyones, mine)
    return next((text for text in everyones if text is not None), None)


def _say(directory: Path, damage: str) -> None:
    print(
        f"warning: checkpoint {directory} is damaged: {damage}; it is set aside as "
        f"{directory.name}.damaged and the run goes on from the one before it",
        file=sys.stderr,
        flush=True,
    )
