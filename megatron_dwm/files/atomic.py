"""Files and folders that are whole under their own name, or not there.

What is written has the temporary name `NAME.partial`, beside its own name, until all its bytes are
on the disk. Then one rename gives it its name. So a reader never sees half of it, also after a full
disk, a kill or a power cut:

    write_bytes, write_text, write_json    a file whose content is at hand
    new_file                               a file that a library writes, or that is written in parts
    new_files                              several files that belong together
    new_folder                             a folder

After an exception the temporary name is gone; a process that is killed leaves it, and the next
writer of the same path replaces it. That needs one writer at a time. Where several processes may
write the same path (a cache), `shared` gives each of them a temporary name of its own,
`NAME.partial-RANDOM`, and the last file, or the first folder, to be complete is the one that stays.

A folder that several processes fill, or that takes the place of an older one, is written at
`partial_path(path)` by its owner, and moved by `replace_folder` or `move_files`.

Every function raises OSError if the disk refuses.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_PARTIAL = ".partial"
_REPLACED = ".replaced"


def partial_path(path: Path) -> Path:
    """The temporary name of `path` while its only writer is at work: `NAME.partial` beside it."""
    return path.with_name(path.name + _PARTIAL)


def write_bytes(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Write a file, in place of an older one."""
    with new_file(path, shared=shared) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text, in place of an older one."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: object, *, indent: int | None = None) -> None:
    """Write a file of one JSON value and a line end, in place of an older one."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


@contextmanager
def new_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary name to write a file to; at the end of the context it becomes `path`.

    It takes the place of an older file. After an exception nothing is left and `path` is as it was.
    """
    partial = _partial_path(path, shared=shared)
    try:
        yield partial
        sync(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_files(paths: Iterable[Path]) -> Iterator[Mapping[Path, Path]]:
    """Give a temporary name for each of `paths`; at the end of the context they become `paths`.

    They are renamed in the order of `paths`, so name last the file that readers look for. One that
    was not written is left out. All of them appear or, after an exception, none. Raises
    FileExistsError, before and after, if there is something at one of `paths`.
    """
    partials = {path: partial_path(path) for path in paths}
    _require_free(partials)
    try:
        yield partials
        written = {path: partial for path, partial in partials.items() if partial.exists()}
        for partial in written.values():
            sync(partial)
        _require_free(partials)
        _rename_all(written)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill; at the end of the context it becomes `path`.

    Raises FileExistsError, before and after, if there is something at `path`; with `shared` a
    folder that another process has put there meanwhile stays, and ours is dropped.
    """
    if not shared:
        _require_free([path])
    partial = _partial_path(path, shared=shared)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync(partial)
        _rename_folder(partial, path, shared=shared)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, path: Path) -> None:
    """Rename the whole folder `partial` to `path`, in place of an older one.

    The older one has the name `NAME.replaced` between the two renames: a process that is killed
    there leaves none at `path`, and `restore_replaced` brings the older one back.
    """
    replaced = path.with_name(path.name + _REPLACED)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    sync_names(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(parent: Path, pattern: str) -> None:
    """Tidy the folders of `parent` whose names match `pattern`, after writers that were killed.

    Unfinished ones are removed. One that was about to be replaced gets its name back, unless the
    new one has it.
    """
    for partial in parent.glob(pattern + _PARTIAL):
        shutil.rmtree(partial)
    for replaced in parent.glob(pattern + _REPLACED):
        path = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if path.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(path)


def move_files(partial: Path, path: Path) -> None:
    """Move the files of folder `partial` into folder `path`, in place of those of the same names.

    One rename a file: for folders of which any mixture of older and newer files is good. Unlike
    `replace_folder` it leaves no moment without a folder.
    """
    sync(partial)
    if not path.exists():
        partial.rename(path)
        return
    for file in partial.iterdir():
        file.replace(path / file.name)
    partial.rmdir()


def sync(path: Path) -> None:
    """Force a file, or a folder with all that is in it, to the disk."""
    for inner in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if inner.is_dir():
            sync_names(inner)
        elif inner.is_file():
            with inner.open("rb") as stream:
                os.fsync(stream.fileno())


def sync_names(path: Path) -> None:
    """Force the names in a folder to the disk, where its file system can do so."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems know no fsync of a folder
            os.fsync(folder)
    finally:
        os.close(folder)


def _partial_path(path: Path, *, shared: bool) -> Path:
    partial = partial_path(path)
    return partial.with_name(f"{partial.name}-{secrets.token_hex(4)}") if shared else partial


def _require_free(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path} exists")


def _rename_all(partials: Mapping[Path, Path]) -> None:
    """Rename each file to its path; after an exception the paths are free again."""
    with ExitStack() as undo:
        for path, partial in partials.items():
            partial.rename(path)
            undo.callback(path.unlink)
        undo.pop_all()


def _rename_folder(partial: Path, path: Path, *, shared: bool) -> None:
    if not shared:
        _require_free([path])
    try:
        partial.rename(path)
    except OSError:
        if not (shared and path.is_dir()):  # another process was first, with the same content
            raise
