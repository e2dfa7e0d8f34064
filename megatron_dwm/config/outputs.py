"""Where outputs go, looked at before any work: names that can be, directories that can be written.

No tool makes a missing parent directory: a slip of the hand in a path would become a tree.
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


def require_writable_parents(paths: Iterable[Path]) -> None:
    """Check that files can be made in the parent directories of `paths`.

    Raises `UserError` for a name that cannot be and for a directory that is missing or cannot be
    written.
    """
    paths = list(paths)
    require_possible_names(paths)
    for directory in dict.fromkeys(path.parent for path in paths):
        try:
            # Tried, since permissions do not tell: a file system may be read-only, also for root.
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            # The error alone does not tell: /proc is there, and says that a new file is not.
            if isinstance(error, FileNotFoundError) and not directory.is_dir():
                raise UserError(f"{directory}: no such output directory; make it first") from None
            raise UserError(
                f"{directory}: no file can be written in this directory ({error.strerror}); "
                "choose another output"
            ) from None
