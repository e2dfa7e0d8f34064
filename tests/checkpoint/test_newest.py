"""Which checkpoint the ranks of a job go on from."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from megatron_dwm.checkpoint import manifest
from megatron_dwm.checkpoint.manifest import (
    FileRecord,
    Manifest,
    Unreadable,
    checkpoint_dir,
    find_damage,
    write_manifest,
)
from megatron_dwm.checkpoint.state import TrainState
from tests.launch import run_ranks


def _two_checkpoints(run_dir: Path) -> None:
    for step in (2, 4):
        state = TrainState(step=step)
        directory = checkpoint_dir(run_dir, state)
        directory.mkdir(parents=True)
        write_manifest(directory, Manifest(state=state, fingerprint={}, files={}))


def test_all_ranks_take_the_checkpoint_that_the_main_process_sees(tmp_path: Path) -> None:
    """A node whose file system shows a folder as it was a minute ago would take another."""
    _two_checkpoints(tmp_path)
    [found] = run_ranks("tests.checkpoint.newest_workers:chosen", 2, [{"run_dir": str(tmp_path)}])
    assert found == ["step_00000004"] * 2


def test_a_directory_of_one_machine_alone_is_refused(tmp_path: Path) -> None:
    """Each machine would save its part of a checkpoint on its own disk."""
    worker = "tests.checkpoint.newest_workers:other_directory"
    [said] = run_ranks(worker, 2, [{"run_dir": str(tmp_path)}])
    for rank, text in enumerate(said):
        assert f"run.dir: {tmp_path / str(rank)} on {socket.gethostname()} is not that of" in text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0", "1"], "nothing is left"


def test_an_error_of_the_file_system_is_no_damage(tmp_path: Path) -> None:
    """A mount that fails for a minute must not set every checkpoint of a run aside."""
    _two_checkpoints(tmp_path)
    [said] = run_ranks(
        "tests.checkpoint.newest_workers:unreadable", 2, [{"run_dir": str(tmp_path)}]
    )
    for text in said:
        assert "step_00000004: a.bin cannot be read (Input/output error), on " in text, said
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004"]


def test_what_a_file_system_says_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file and a folder in its place are damage, an error is not."""
    (tmp_path / "folder").mkdir()
    record = FileRecord(bytes=(tmp_path / "folder").stat().st_size, crc32="0" * 8)
    assert find_damage(tmp_path, [("gone", record)]) == "gone is missing"
    assert find_damage(tmp_path, [("folder", record)]) == "folder is no file"

    def fails(_: Path) -> FileRecord:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "record_file", fails)
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(Unreadable, match="a cannot be read"):
        find_damage(tmp_path, [("a", FileRecord(bytes=1, crc32="0" * 8))])
