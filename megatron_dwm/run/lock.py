"""Ensures that one job at a time uses a run directory, and notices if the directory is removed.

The main process holds a lock on `.lock` until it ends (files/lock.py), and writes who it is there.
A server may hold the lock of a machine that went down for minutes, so a job that Slurm has requeued
or that followed another one (--dependency) waits for it.

If somebody removes or moves the directory, the run's records and checkpoints are gone. The next
save would create parts of the directory again, which would look like a run. So the job checks from
time to time that the directory still exists.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megatron_dwm.config import RunError, UserError
from megatron_dwm.config.printing import printable
from megatron_dwm.files.lock import lock_file

LOCK = ".lock"
_PATIENCE_S, _PAUSE_S = 180.0, 1.0


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
        _sign(lock)
        return True

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


def _follows_another() -> bool:
    """True in a job that Slurm has requeued, or started after another one."""
    restarts, dependency = "SLURM_RESTART_COUNT", "SLURM_JOB_DEPENDENCY"
    return int(os.environ.get(restarts) or 0) > 0 or bool(os.environ.get(dependency))


def _locked(path: Path, patience_s: float) -> BinaryIO:
    follows = _follows_another()
    deadline = time.monotonic() + (patience_s if follows else 0.0)
    while True:
        try:
            return lock_file(path)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_PAUSE_S)
                continue
            run_dir, who = path.parent, _holder(path)
            kind = RunError if follows else UserError
            raise kind(
                f"run.dir: another process is training in {run_dir}{who}; wait for it, stop it "
                f"(touch {run_dir / 'stop'}), or choose another directory"
            ) from None


def _sign(lock: BinaryIO) -> None:
    job = os.environ.get("SLURM_JOB_ID")
    text = f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}\n"
    with suppress(OSError):  # a full disk stops neither a start nor, by a buffer, an end
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), text.encode())


def _holder(path: Path) -> str:
    with suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        return f" ({printable(text)})" if text else ""
    return ""


@contextmanager
def only_job(run_dir: Path, timeout_s: float = 600.0) -> Iterator[HeldDirectory]:
    """Hold the run directory. Raises UserError if another process holds it.

    Raises RunError if a job that follows another has waited for it in vain. timeout_s: how long the
    other ranks wait for this one.
    """
    lock = _locked(run_dir / LOCK, min(_PATIENCE_S, timeout_s / 2))
    _sign(lock)
    held = HeldDirectory(run_dir, lock)
    try:
        yield held
    finally:
        held.close()
