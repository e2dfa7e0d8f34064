"""A locked file cannot be locked again until it is closed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.files.lock import lock_file


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with lock_file(tmp_path / "lock"), pytest.raises(BlockingIOError):
        lock_file(tmp_path / "lock")
    lock_file(tmp_path / "lock").close()
