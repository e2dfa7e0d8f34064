"""One process at a time, by a lock on a file.

The kernel lets go of it however the process ends, `kill -9` included. On a network file system the
lock is the file system's.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import BinaryIO


def lock_file(path: Path) -> BinaryIO:
    """Lock the file at `path`, made if it is missing, until the result is closed.

    Raises BlockingIOError if another process has locked it, and OSError if it cannot be opened.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file
