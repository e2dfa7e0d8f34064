"""Finds the checkpoint that a resumed run continues from: the newest complete one.

Every file of a candidate is read once, split over the ranks, so the cost is about that of the load
that follows. A damaged checkpoint is reported and renamed, and the one before it is tried. An error
of the file system is no damage: it ends the start, and nothing is renamed.
"""

from __future__ import annotations

import socket
from pathlib import Path

import torch.distributed as dist

from megatron_dwm.checkpoint.manifest import (
    Unreadable,
    checkpoint_dir,
    find_damage,
    list_checkpoints,
    read_manifest,
    set_aside,
    tidy,
)
from megatron_dwm.config import RunError, UserError
from megatron_dwm.runtime import Runtime
from megatron_dwm.runtime.warn import print_warning

_UNREADABLE = "unreadable: "


def newest_whole_checkpoint(run_dir: Path, runtime: Runtime) -> Path | None:
    """Returns the newest complete checkpoint, or None if the run has none (collective).

    Raises UserError if there are checkpoints, but none is complete, and RunError, on every rank, if
    the file system cannot be read on one of them.
    """
    if runtime.is_main:
        tidy(run_dir)
    runtime.barrier()
    found = _as_main_sees(list_checkpoints(run_dir), runtime)
    damaged: list[str] = []
    for directory in reversed(found):
        damage = _damage(directory, runtime)
        if damage is None:
            return directory
        damaged.append(f"{directory.name} ({damage})")
        if runtime.is_main:
            _warn(directory, damage)
            set_aside(directory)
        runtime.barrier()
    if damaged:
        raise UserError(
            f"run.dir: no checkpoint in {run_dir} is whole: {', '.join(damaged)}; bring back a "
            "copy, or choose another run.dir to begin again"
        )
    return None


def _as_main_sees(found: list[Path], runtime: Runtime) -> list[Path]:
    """Returns the list of the main process; another node may see its folder as it was before."""
    everyones: list[list[Path]] = [found]
    if runtime.world_size > 1:
        dist.broadcast_object_list(everyones, src=0)
    return everyones[0]


def _damage(directory: Path, runtime: Runtime) -> str | None:
    """Returns what is wrong with a checkpoint, or None, the same on every rank (collective)."""
    try:
        manifest = read_manifest(directory)
        files = sorted(manifest.files.items())
        mine = find_damage(directory, files[runtime.rank :: runtime.world_size])
        right = checkpoint_dir(directory.parent.parent, manifest.state).name
        if directory.name != right:
            mine = f"it is {right} by its manifest, under another name"
    except UserError:
        raise
    except Unreadable as error:
        mine = f"{_UNREADABLE}{error}, on {socket.gethostname()}"
    except ValueError as error:
        mine = str(error)
    everyones: list[str | None] = [mine]
    if runtime.world_size > 1:
        everyones = [None] * runtime.world_size
        dist.all_gather_object(everyones, mine)
    problems = [text for text in everyones if text is not None]
    _require_readable(directory, problems)
    return problems[0] if problems else None


def _require_readable(directory: Path, problems: list[str]) -> None:
    for text in problems:
        if text.startswith(_UNREADABLE):
            raise RunError(
                f"checkpoint {directory}: {text.removeprefix(_UNREADABLE)}; start again when it "
                "can be read, or move the checkpoint away to go on from the one before it"
            )


def _warn(directory: Path, damage: str) -> None:
    print_warning(
        f"checkpoint {directory} is damaged: {damage}; it is set aside as "
        f"{directory.name}.damaged and the one before it, if there is one, is next"
    )
