"""An output directory that appears complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dwm.config import UserError
from megatron_dwm.config.outputs import require_possible_names, require_writable_parents
from megatron_dwm.files.atomic import new_folder, partial_path


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Yields a directory to write into, which becomes `output` unless an exception was raised.

    Raises `UserError` if `output` exists, at the start or at the end, or cannot be created; its
    parent directory has to exist.
    """
    require_free(output)
    # Its temporary name is random, so that no directory of the user's has it.
    with new_folder(output, shared=True) as partial:
        yield partial
        require_free(output)


def require_free(output: Path) -> None:
    """Raise `UserError` if `output` exists or cannot be created."""
    require_possible_names([output])
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists; name another --output or remove it")
    require_writable_parents([partial_path(output)])
