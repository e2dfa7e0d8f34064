"""Whether a run has ever completed a checkpoint, noted apart from the checkpoints themselves.

A run whose `checkpoints/` is gone must not begin again as if there had been none; one whose disk
was full from the start has nothing to bring back. The note is an empty file that is renamed when
the first checkpoint is whole: that needs no room on a full disk.
"""

from __future__ import annotations

from pathlib import Path

_NONE_YET = ".no_checkpoint_yet"
_HAD_ONE = ".had_checkpoint"


def note_start(run_dir: Path, *, had_one: bool) -> None:
    """Begin the note of a run that starts or goes on. Raises OSError."""
    if had_one:
        note_checkpoint(run_dir)
    else:
        (run_dir / _NONE_YET).touch()


def note_checkpoint(run_dir: Path) -> None:
    """Note that a checkpoint of the run is whole. Raises OSError."""
    had_one = run_dir / _HAD_ONE
    if had_one.exists():
        return
    try:
        (run_dir / _NONE_YET).rename(had_one)
    except FileNotFoundError:
        had_one.touch()


def ever_had_checkpoint(run_dir: Path) -> bool | None:
    """Whether the run has ever had one; None if an older version began it, without a note."""
    if (run_dir / _HAD_ONE).exists():
        return True
    return False if (run_dir / _NONE_YET).exists() else None
