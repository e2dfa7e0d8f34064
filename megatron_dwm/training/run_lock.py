"""One job to a run directory, and the directory that it was to the end.

The main process holds a lock on `.lock` for as long as it lives; the kernel lets go of it however
the process ends, `kill -9` included. On a network file system the lock is the file system's.

Whoever removes or moves the directory takes the run's records and checkpoints with it. A save would
make parts of it anew and look like a run, so the job asks now and then whether it is still there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_dwm.config import UserError

LOCK = ".lock"


class HeldDirectory:
    """A run directory that this process has locked."""

    def __init__(self, run_dir: Path, lock: IO[str]) -> None:
        self._run_dir, self._lock = run_dir, lock
        self._place = run_dir.stat()

    def is_lost(self) -> bool:
        """Whether the path leads nowhere or elsewhere, or another job has taken the lock.

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
        """Whether the lock file at the path could be locked, made if need be."""
        try:
            lock = (self._run_dir / LOCK).open("a")
        except OSError:
            return False
        if not _taken(lock):
            lock.close()
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
    lock = (run_dir / LOCK).open("a")
    if not _taken(lock):
        lock.close()
        raise UserError(
            f"run.dir: another process is training in {run_dir}; wait for it, stop it "
            f"(touch {run_dir / 'stop'}), or choose another directory"
        )
    held = HeldDirectory(run_dir, lock)
    try:
        yield held
    finally:
        held.close()


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
