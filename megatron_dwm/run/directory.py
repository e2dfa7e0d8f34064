"""Checks of the run directory before a start: does it contain a run that may be resumed?"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_dwm.checkpoint.manifest import list_checkpoints
from megatron_dwm.config import Config, UserError
from megatron_dwm.config.defaults import with_earlier_defaults
from megatron_dwm.config.load import load, read_typed_paths
from megatron_dwm.run.changes import refuse_changes
from megatron_dwm.run.job import INDEX_CACHE
from megatron_dwm.run.lock import LOCK

# Files of a start that ended before it wrote config.yaml.
_BEFORE_THE_RUN = {LOCK, INDEX_CACHE, "config.yaml.partial"}


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
        if any(entry.name not in _BEFORE_THE_RUN for entry in run_dir.iterdir()):
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
