"""One process at a time, by a lock on a file.

The kernel lets go of it however the process ends, `kill -9` included. On a network file system the
lock is the file system's. Some have none (Lustre without its mount option `flock`, NFS without a
lock manager): there work goes on unlocked, after a warning.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


def lock_file(path: Path) -> BinaryIO:
    """Lock the file at `path`, made if it is missing, until the result is closed.

    Raises BlockingIOError if another process has locked it, and OSError if it cannot be opened.
    Warns on stderr if its file system has no locks.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            _warn_of_no_locks(path, error)
            return file
        file.close()
        raise
    return file


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the right to write `path`, by a lock on `NAME.lock` beside it, removed at the end.

    Raises BlockingIOError if another process holds it, and OSError if nothing can be written there.
    """
    lock = path.with_name(path.name + ".lock")
    file = lock_file(lock)
    while not _is_at(file, lock):  # its last holder removed it after we opened it
        file.close()
        file = lock_file(lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _warn_of_no_locks(path: Path, error: OSError) -> None:
    print(
        f"warning: {path}: its file system has no locks ({error.strerror}): nothing stops a second "
        "process from writing here; on Lustre the mount option flock brings them",
        file=sys.stderr,
        flush=True,
    )
