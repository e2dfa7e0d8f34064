"""One job to a run directory, and the directory that it was to the end.

The main process holds a lock on `.lock` for as long as it lives (files/lock.py).

Whoever removes or moves the directory takes the run's records and checkpoints with it. A save would
make parts of it anew and look like a run, so the job asks now and then whether it is still there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_dwm.config import UserError
from megatron_dwm.files.lock import lock_file

LOCK = ".lock"


class HeldDirectory:
    """A run directory that this process has locked."""

    def __init__(self, run_dir: Path, lock: BinaryIO) -> None:
        self._run_dir, self._lock = run_dir, lock
        self._place = run_dir.stat()

    def is_lost(self) -> bool:
        """True if the path leads nowhere or elsewhere, or another job has taken the lock.

        A lock file that was removed is made and taken anew. Cost: two look-ups of file names.
        """
        try:
            if not os.path.samestat(self._run_dir.stat(), self._place):
                return True
            if os.path.samestat((self._run_dir / LOCK).stat(), os.fstat(self._lock.fileno())):
                return False
        except FileNotFoundError:
            if not self._run_dir.is_dir():
                return True
        except NotADirectoryError:
            return True
        except OSError:  # the file system is in trouble, which says nothing about the directory
            return False
        return not self._retaken()

    def _retaken(self) -> bool:
        """True if the lock file at the path could be locked, made if need be."""
        try:
            lock = lock_file(self._run_dir / LOCK)
        except OSError:
            return False
        self._lock.close()
        self._lock = lock
        return True

    def close(self) -> None:
        """Let go."""
        self._lock.close()


@contextmanager
def only_job(run_dir: Path) -> Iterator[HeldDirectory]:
    """Hold the run directory. Raises UserError if another process holds it."""
    try:
        lock = lock_file(run_dir / LOCK)
    except BlockingIOError:
        raise UserError(
            f"run.dir: another process is training in {run_dir}; wait for it, stop it "
            f"(touch {run_dir / 'stop'}), or choose another directory"
        ) from None
    held = HeldDirectory(run_dir, lock)
    try:
        yield held
    finally:
        held.close()
