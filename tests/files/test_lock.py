"""Locks: one holder at a time, released by any end of a process, and nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from megatron_dwm.files.lock import lock_file, only_writer


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with lock_file(tmp_path / "lock"), pytest.raises(BlockingIOError):
        lock_file(tmp_path / "lock")
    lock_file(tmp_path / "lock").close()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "output"
    for _ in range(2):
        with only_writer(output):
            assert [path.name for path in tmp_path.iterdir()] == ["output.lock"]
            with pytest.raises(BlockingIOError), only_writer(output):
                pass
            assert [path.name for path in tmp_path.iterdir()] == ["output.lock"]
        assert not list(tmp_path.iterdir())
    (tmp_path / "output.lock").touch()  # of a writer that was killed
    with only_writer(output):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_its_holder_has_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first writer ends after the second has opened its lock and before the second locks it."""
    lock, flock, calls = tmp_path / "output.lock", fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not calls:
            lock.unlink()
        calls.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_writer(tmp_path / "output"):
        assert len(calls) == 2
        with pytest.raises(BlockingIOError):
            lock_file(lock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with only_writer(tmp_path / "output"):
        pass
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "its file system has no locks" in line
