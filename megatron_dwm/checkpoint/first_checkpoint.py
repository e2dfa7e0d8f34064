"""A note that says if a run has ever completed a checkpoint, kept outside of `checkpoints/`.

A run that lost its `checkpoints/` must not silently start again. A run whose disk was full from the
start never had one, and may. The note is an empty file that is renamed when the first checkpoint is
complete: a rename needs no space on a full disk.
"""

from __future__ import annotations

from pathlib import Path

_NONE_YET = ".no_checkpoint_yet"
_HAD_ONE = ".had_checkpoint"


def note_start(run_dir: Path, *, had_one: bool) -> None:
    """Write the note of a run that starts or resumes. Raises OSError."""
    if had_one:
        note_checkpoint(run_dir)
    else:
        (run_dir / _NONE_YET).touch()


def note_checkpoint(run_dir: Path) -> None:
    """Note that a checkpoint of the run is complete. Raises OSError."""
    had_one = run_dir / _HAD_ONE
    if had_one.exists():
        return
    try:
        (run_dir / _NONE_YET).rename(had_one)
    except FileNotFoundError:
        had_one.touch()


def ever_had_checkpoint(run_dir: Path) -> bool | None:
    """True if the run ever had a checkpoint; None if a version without notes started it."""
    if (run_dir / _HAD_ONE).exists():
        return True
    return False if (run_dir / _NONE_YET).exists() else None
