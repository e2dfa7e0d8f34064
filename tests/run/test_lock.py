"""Who holds a run directory, and how long a requeued job waits for it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from megatron_dwm.config import RunError, UserError
from megatron_dwm.run import lock
from megatron_dwm.run.lock import only_job


def test_the_holder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with only_job(tmp_path), pytest.raises(UserError) as refusal, only_job(tmp_path):
        raise AssertionError("two processes hold one directory")
    assert f"training in {tmp_path} (process {os.getpid()} on " in str(refusal.value)
    assert ", job 7); wait for it" in str(refusal.value)


def test_a_full_disk_stops_neither_start_nor_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int, text: bytes) -> int:
        raise OSError(errno.ENOSPC, f"no space for {len(text)} bytes")

    monkeypatch.setattr(lock.os, "write", full)
    with only_job(tmp_path) as held:
        assert not held.is_lost()


@pytest.mark.parametrize(
    "variable", [("SLURM_RESTART_COUNT", "1"), ("SLURM_JOB_DEPENDENCY", "singleton")]
)
def test_a_job_that_follows_another_waits_for_a_lock(
    variable: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server keeps that of a machine that went down for some minutes; then it is a failure."""
    monkeypatch.setenv(*variable)
    monkeypatch.setattr(lock, "_PAUSE_S", 0.05)
    held = lock.lock_file(tmp_path / lock.LOCK)
    later = threading.Timer(0.5, held.close)
    later.start()
    with only_job(tmp_path):
        assert held.closed, "it was taken away"
        monkeypatch.setattr(lock, "_PATIENCE_S", 0.2)
        with pytest.raises(RunError, match="another process is training"), only_job(tmp_path):
            raise AssertionError("two processes hold one directory")
    later.join()
