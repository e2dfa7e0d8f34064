"""Ensures that one job at a time uses a run directory, and notices if the directory is removed.

The main process holds a lock on `.lock` until it ends (files/lock.py).

If somebody removes or moves the directory, the run's records and checkpoints are gone. The next
save would create parts of the directory again, which would look like a run. So the job checks from
time to time that the directory still exists.
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
        self._identity = run_dir.stat()

    def is_lost(self) -> bool:
        """True if the directory was removed or replaced, or another job has the lock.

        A lock file that was removed is created and locked again. Cost: two look-ups of file names.
        """
        try:
            if not os.path.samestat(self._run_dir.stat(), self._identity):
                return True
            if os.path.samestat((self._run_dir / LOCK).stat(), os.fstat(self._lock.fileno())):
                return False
        except FileNotFoundError:
            if not self._run_dir.is_dir():
                return True
        except NotADirectoryError:
            return True
        except OSError:  # an error of the file system says nothing about the directory
            return False
        return not self._lock_again()

    def _lock_again(self) -> bool:
        """Create the lock file if necessary and lock it; False if that fails."""
        try:
            lock = lock_file(self._run_dir / LOCK)
        except OSError:
            return False
        self._lock.close()
        self._lock = lock
        return True

    def close(self) -> None:
        """Release the lock."""
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
