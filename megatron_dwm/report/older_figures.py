"""Removes the PNG files of an earlier report that the present one does not have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_dwm.files.atomic import write_text

LIST = "figures.txt"
_HEAD = "# Figures that the report wrote here; it removes those that it writes no more."
_NAME = re.compile(r"\w+\.png", re.ASCII)


def remove_older(folder: Path, written: Sequence[str]) -> None:
    """Remove the PNG files that the folder's list names and this report did not write.

    Then the list names what it did write. A file of that name that is no such list stays as it is.
    """
    path = folder / LIST
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    if path.exists() and lines[:1] != [_HEAD]:
        return
    for name in lines[1:]:
        older = folder / name
        if _NAME.fullmatch(name) and name not in written and older.is_file():
            older.unlink()
    write_text(path, "\n".join([_HEAD, *written]) + "\n")
