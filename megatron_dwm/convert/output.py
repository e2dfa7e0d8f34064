"""An output directory that appears complete or not at all.

A conversion writes into a hidden directory beside the output, which is renamed at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dwm.config import UserError
from megatron_dwm.config.outputs import require_possible_names, require_writable_parents


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Yields a directory to write into; renames it to `output` unless an exception was raised.

    Raises `UserError` if `output` exists, at the start or at the end, or cannot be created; its
    parent directory has to exist.
    """
    require_free(output)
    partial = _partial(output)
    partial.mkdir()
    try:
        yield partial
        require_free(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_free(output: Path) -> None:
    """Raise `UserError` if `output` exists or cannot be created."""
    require_possible_names([output])
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists; name another --output or remove it")
    require_writable_parents([_partial(output)])


def _partial(output: Path) -> Path:
    """Returns the hidden directory of this process beside `output`; its name is the longer one."""
    return output.with_name(f".{output.name}.partial-{os.getpid()}")
