"""One job to a run directory.

The main process holds a lock on `.lock` for as long as it lives; the kernel lets go of it however
the process ends, `kill -9` included. On a network file system the lock is the file system's.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dwm.config import UserError

LOCK = ".lock"


@contextmanager
def only_job(run_dir: Path) -> Iterator[None]:
    """Hold the run directory. Raises UserError if another process holds it."""
    with (run_dir / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run.dir: another process is training in {run_dir}; wait for it, stop it "
                f"(touch {run_dir / 'stop'}), or choose another directory"
            ) from None
        yield
