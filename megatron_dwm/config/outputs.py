"""Outputs of tools: checked before any work, and then either complete or absent.

No tool creates a missing parent directory, since a misspelled path would create a tree. No tool
overwrites an output. Of several that are to write the same output, the first does and the others
are refused.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_dwm.config.errors import UserError
from megatron_dwm.files.atomic import new_files, partial_path
from megatron_dwm.files.lock import only_writer

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def require_possible_names(paths: Iterable[Path]) -> None:
    """Raise `UserError` if the file system does not allow one of these names."""
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
    """Check that files can be created in the parent directories of `paths`.

    Raises `UserError` for a name that is not allowed, and for a directory that is missing or
    cannot be written.
    """
    paths = list(paths)
    require_possible_names(paths)
    for directory in dict.fromkeys(path.parent for path in paths):
        try:
            # Permissions are not enough to know: a file system may be read-only, even for root.
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            # The error is not enough to know: /proc exists and raises it for every new file.
            if isinstance(error, FileNotFoundError) and not directory.is_dir():
                raise UserError(f"{directory}: no such output directory; make it first") from None
            raise UserError(
                f"{directory}: no file can be written in this directory ({error.strerror}); "
                "choose another output"
            ) from None


def why_unwritable(error: OSError) -> str | None:
    """Returns the reason if the disk is full or read-only; None for any other error."""
    if error.errno not in _NO_ROOM:
        return None
    return error.strerror or " ".join(str(error).split())


@contextmanager
def new_outputs(paths: Sequence[Path]) -> Iterator[Mapping[Path, Path]]:
    """Give a temporary name for each of `paths`; when the context ends, the files become `paths`.

    Files that were not written are left out; after an exception none appears. Raises `UserError`,
    before and after, if one of `paths` exists, and before if one cannot be written, or if another
    process is writing the last.
    """
    require_possible_names(paths)
    refuse_existing(paths)
    require_writable_parents([partial_path(path) for path in paths])
    with sole_writer(paths[-1]):
        refuse_existing(paths)
        with new_files(paths) as partials:
            yield partials
            refuse_existing(paths)


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the right to write `path`. Raises `UserError` if another process holds it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(only_writer(path))
        except BlockingIOError:
            raise UserError(
                f"{path}: another process is writing it; wait for it, or choose another output"
            ) from None
        yield


def refuse_existing(paths: Iterable[Path]) -> None:
    """Raise `UserError` if there is something at one of `paths`."""
    for path in paths:
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} exists; choose another output or remove it")
