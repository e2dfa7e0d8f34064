"""A directory that appears whole or not at all.

A conversion writes into a hidden directory beside the wanted one, which gets its name at the end.
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
    """A directory to write into, renamed to `output` when the context ends without an exception.

    Raises `UserError` if `output` exists, before and after, or cannot be made; its parent directory
    has to be there.
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
    """`UserError` if there is anything at `output`, or nothing can be."""
    require_possible_names([output])
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists; name another --output or remove it")
    require_writable_parents([_partial(output)])


def _partial(output: Path) -> Path:
    """The hidden directory of this process beside `output`; its name is the longer one."""
    return output.with_name(f".{output.name}.partial-{os.getpid()}")
