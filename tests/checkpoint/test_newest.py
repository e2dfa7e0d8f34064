"""Which checkpoint the ranks of a job go on from."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.checkpoint.manifest import Manifest, checkpoint_dir, write_manifest
from megatron_dwm.checkpoint.state import TrainState
from tests.launch import run_ranks


def test_all_ranks_take_the_checkpoint_that_the_main_process_sees(tmp_path: Path) -> None:
    """A node whose file system shows a folder as it was a minute ago would take another."""
    for step in (2, 4):
        state = TrainState(step=step)
        directory = checkpoint_dir(tmp_path, state)
        directory.mkdir(parents=True)
        write_manifest(directory, Manifest(state=state, fingerprint={}, files={}))
    [found] = run_ranks("tests.checkpoint.newest_workers:chosen", 2, [{"run_dir": str(tmp_path)}])
    assert found == ["step_00000004"] * 2
