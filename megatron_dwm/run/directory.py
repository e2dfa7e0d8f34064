"""Checks of the run directory before a start: does it contain a run that may be resumed?"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

import torch.distributed as dist

from megatron_dwm.checkpoint.manifest import list_checkpoints
from megatron_dwm.config import Config, UserError
from megatron_dwm.config.defaults import with_earlier_defaults
from megatron_dwm.config.load import load, read_typed_paths
from megatron_dwm.run.changes import refuse_changes
from megatron_dwm.run.job import INDEX_CACHE
from megatron_dwm.run.lock import LOCK
from megatron_dwm.runtime import Runtime

# Files of a start that ended before it wrote config.yaml.
_BEFORE_THE_RUN = {LOCK, INDEX_CACHE, "config.yaml.partial"}
_SHARED = ".shared-"


def run_to_resume(config: Config) -> Config | None:
    """Returns the configuration of the run to resume; None if the directory has no run.

    Raises UserError if the directory has a run that must not be resumed: a run is never
    overwritten.
    """
    run_dir = Path(config.run.dir)
    _require_writable(run_dir)
    saved = run_dir / "config.yaml"
    _require_directory(run_dir / "checkpoints")
    if not saved.is_file():
        if not all(_is_before_the_run(entry.name) for entry in run_dir.iterdir()):
            _point_to_a_copy(run_dir, f"{saved} is missing")
            raise UserError(
                f"run.dir: {run_dir} is not empty and holds no run; choose another directory"
            )
        return None
    if not config.run.resume:
        raise UserError(
            f"run.dir: {run_dir} already holds a run; choose another directory, or continue it "
            "with --run.resume true"
        )
    try:
        loaded, typed = load([str(saved)]), read_typed_paths(saved)
    except UserError as error:
        _point_to_a_copy(run_dir, str(error))
        raise
    before = with_earlier_defaults(loaded.config, loaded.given.file)
    refuse_changes(before, config, run_dir, typed)
    return before


def _is_before_the_run(name: str) -> bool:
    return name in _BEFORE_THE_RUN or name.startswith(_SHARED)


def require_shared(run_dir: Path, runtime: Runtime) -> None:
    """Raise UserError on all ranks if one of them has another directory there (collective).

    Otherwise each machine would save its part of a checkpoint on its own disk.
    """
    if runtime.world_size == 1:
        return
    token = [_make_token(run_dir) if runtime.is_main else None]
    dist.broadcast_object_list(token, src=0)
    if token[0] is None:
        raise UserError(
            f"run.dir: {run_dir} cannot be written; free some space or grant permission, and start "
            "again: nothing is lost"
        )
    mine = None if (run_dir / token[0]).exists() else socket.gethostname()
    hosts: list[str | None] = [None] * runtime.world_size
    dist.all_gather_object(hosts, mine)
    if runtime.is_main:
        (run_dir / token[0]).unlink(missing_ok=True)
    without = sorted({host for host in hosts if host is not None})
    if without:
        raise UserError(
            f"run.dir: {run_dir} on {', '.join(without)} is not that of rank 0; name a directory "
            "on a file system that all machines share"
        )


def _make_token(run_dir: Path) -> str | None:
    """Make a file of a new name, whose absence no machine remembers; None if that fails."""
    name = f"{_SHARED}{uuid.uuid4().hex}"
    try:
        for left in run_dir.glob(f"{_SHARED}*"):  # of a start that was killed
            left.unlink(missing_ok=True)
        (run_dir / name).touch()
    except OSError:
        return None
    return name


def _require_directory(checkpoints: Path) -> None:
    """Raise UserError if `checkpoints` is a file or a broken link."""
    if (checkpoints.exists() or checkpoints.is_symlink()) and not checkpoints.is_dir():
        raise UserError(
            f"run.dir: {checkpoints} is no directory (is a disk not mounted?); restore it, or "
            "choose another run.dir"
        )


def _point_to_a_copy(run_dir: Path, trouble: str) -> None:
    """Raise UserError if a checkpoint has the configuration that the run's directory lacks."""
    copies = [path / "config.yaml" for path in list_checkpoints(run_dir)]
    found = [path for path in copies if path.is_file() and path.stat().st_size]
    if found:
        raise UserError(f"run.dir: {trouble}; copy {found[-1]} to {run_dir / 'config.yaml'}")


def _require_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir: cannot make {run_dir} ({error.strerror}); name another directory"
        ) from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise UserError(f"run.dir: {run_dir} cannot be written; name another directory")
