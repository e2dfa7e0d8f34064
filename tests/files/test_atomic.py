"""A file or folder is whole under its own name, or not there, whenever its writer stops."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from megatron_dwm.files import atomic
from megatron_dwm.files.atomic import (
    move_files,
    new_file,
    new_files,
    new_folder,
    partial_path,
    replace_folder,
    restore_replaced,
    sync,
    write_bytes,
    write_json,
    write_text,
)


class Killed(BaseException):
    """Stands for the end of the process."""


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_content_is_written_in_place_of_older(tmp_path: Path) -> None:
    for content in ("older", "newer"):
        write_text(tmp_path / "text", content)
        write_bytes(tmp_path / "bytes", content.encode(), shared=True)
        write_json(tmp_path / "json", {"content": content}, indent=1)
    assert (tmp_path / "text").read_text() == (tmp_path / "bytes").read_text() == "newer"
    assert json.loads((tmp_path / "json").read_text()) == {"content": "newer"}
    assert _names(tmp_path) == ["bytes", "json", "text"]


@pytest.mark.parametrize("shared", [False, True])
def test_an_exception_leaves_the_older_file(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file"
    path.write_text("older")
    with pytest.raises(Killed), new_file(path, shared=shared) as partial:
        partial.write_text("ne")
        raise Killed
    assert _names(tmp_path) == ["file"]
    assert path.read_text() == "older"


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "older")
    monkeypatch.setattr(atomic.os, "fsync", _full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "file", "newer")
    assert _names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "older"


def test_what_a_killed_writer_left_is_replaced(tmp_path: Path) -> None:
    partial_path(tmp_path / "file").write_text("half of much longer content")
    write_text(tmp_path / "file", "whole")
    partial_path(tmp_path / "folder").mkdir()
    (partial_path(tmp_path / "folder") / "half").touch()
    with new_folder(tmp_path / "folder") as partial:
        (partial / "whole").touch()
    assert (tmp_path / "file").read_text() == "whole"
    assert _names(tmp_path) == ["file", "folder", "folder/whole"]


def test_shared_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with new_file(path, shared=True) as first, new_file(path, shared=True) as second:
        first.write_text("first")
        second.write_text("second")
        assert len({path, partial_path(path), first, second}) == 4
    assert path.read_text() == "first", "its context ended last"
    assert _names(tmp_path) == ["file"]


def test_several_files_appear_in_order_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("bin", "left_out", "idx")]
    with pytest.raises(Killed), new_files(paths) as partials:
        partials[paths[0]].touch()
        raise Killed
    assert _names(tmp_path) == []

    rename = Path.rename

    def failing(source: Path, target: Path) -> Path:
        if target.name == "idx":
            _full_disk()
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space left"), new_files(paths) as partials:
        partials[paths[0]].touch()
        partials[paths[2]].touch()
    assert _names(tmp_path) == []
    monkeypatch.undo()

    with new_files(paths) as partials:
        partials[paths[0]].touch()
        partials[paths[2]].touch()
        assert _names(tmp_path) == ["bin.partial", "idx.partial"]
    assert _names(tmp_path) == ["bin", "idx"]


@pytest.mark.parametrize("new", [lambda path: new_files([path]), new_folder])
def test_new_outputs_never_overwrite(
    tmp_path: Path, new: Callable[[Path], AbstractContextManager[object]]
) -> None:
    path = tmp_path / "output"
    with pytest.raises(FileExistsError, match="output exists"), new(path):
        path.mkdir()  # somebody else's, while ours is written
        (path / "theirs").touch()
    assert _names(tmp_path) == ["output", "output/theirs"]
    with pytest.raises(FileExistsError, match="output exists"), new(path):
        pytest.fail("it was there before")


def test_the_first_shared_folder_stays(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with new_folder(path, shared=True) as late, new_folder(path, shared=True) as first:
        (first / "first").touch()
        (late / "late").touch()
    assert _names(tmp_path) == ["folder", "folder/first"]


def test_a_folder_is_replaced_and_a_kill_between_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step_1"
    for name in ("older", "newer"):
        partial_path(path).mkdir()
        (partial_path(path) / name).touch()
        replace_folder(partial_path(path), path)
    assert _names(tmp_path) == ["step_1", "step_1/newer"]

    rename = Path.rename

    def killed(source: Path, target: Path) -> Path:
        if source == partial_path(path):
            raise Killed
        return rename(source, target)

    partial_path(path).mkdir()
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        replace_folder(partial_path(path), path)
    monkeypatch.undo()
    assert _names(tmp_path) == ["step_1.partial", "step_1.replaced", "step_1.replaced/newer"]
    restore_replaced(tmp_path, "step_*")
    assert _names(tmp_path) == ["step_1", "step_1/newer"]


def test_an_older_folder_is_removed_where_the_newer_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1.replaced").mkdir()
    (tmp_path / "mine.partial").mkdir()
    restore_replaced(tmp_path, "step_*")
    assert _names(tmp_path) == ["mine.partial", "step_1"]


def test_all_of_a_folder_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and the names of files, before the rename; the new name after it."""
    fsync, flushed = os.fsync, []

    def noted(file: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    partial = tmp_path / "new.partial"
    (partial / "inner").mkdir(parents=True)
    for name in ("one", "inner/two"):
        (partial / name).write_text("x")
    sync(partial)
    expected = [partial, partial / "one", partial / "inner", partial / "inner/two"]
    assert sorted(flushed) == sorted(map(str, expected))
    replace_folder(partial, tmp_path / "new")
    assert flushed[-1] == str(tmp_path)


def test_files_move_one_by_one_into_a_folder(tmp_path: Path) -> None:
    path, partial = tmp_path / "stage_1", tmp_path / "stage_1.partial"
    for content in ("older", "newer"):
        partial.mkdir()
        (partial / "tensors").write_text(content)
        (partial / content).touch()
        move_files(partial, path)
    assert (path / "tensors").read_text() == "newer"
    assert _names(tmp_path) == ["stage_1", *(f"stage_1/{n}" for n in ("newer", "older", "tensors"))]
