"""Where outputs go, looked at before any work: names that can be, directories that can be written.

All tools make the missing parent directories of what they write.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from megatron_dwm.config.errors import UserError


def require_possible_names(paths: Iterable[Path]) -> None:
    """Raise `UserError` if the file system can have no file of one of these names."""
    for path in paths:
        try:
            path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(
                f"{path}: no file can have this name ({error.strerror}); choose another output"
            ) from None


def make_parents(paths: Iterable[Path]) -> None:
    """Make the missing parent directories of `paths`, and try that files can be made in them.

    Raises `UserError` for a name that cannot be and for a directory that cannot be made or written.
    """
    paths = list(paths)
    require_possible_names(paths)
    for directory in dict.fromkeys(path.parent for path in paths):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # Tried, since permissions do not tell: a file system may be read-only, also for root.
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise UserError(
                f"{directory}: no file can be written in this directory ({error.strerror}); "
                "choose another output"
            ) from None
