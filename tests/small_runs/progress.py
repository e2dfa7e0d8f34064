"""How far a run has come, and whether two runs ended in the same state."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from tests.small_runs.command import without_time
from tests.small_runs.forked import LIMIT_S, Job


def assert_same(run_dir: Path, expected: Path) -> None:
    """Bit for bit: every metric, and parameters, moments and counters of the last checkpoint."""
    assert without_time(run_dir) == without_time(expected)
    ours, theirs = (read_manifest(list_checkpoints(d)[-1]) for d in (run_dir, expected))
    for name, record in theirs.files.items():
        if name.endswith(".distcp") or name == "training.pt":
            assert ours.files[name] == record, name


def last_step(run_dir: Path) -> int:
    """The step of the newest line that is whole."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return 0
    lines = file.read_text().splitlines()
    return sum('"phase": "train"' in line and line.endswith("}") for line in lines)


def saved_step(run_dir: Path) -> int:
    """The step that a resumed run goes on from."""
    found = list_checkpoints(run_dir)
    return read_manifest(found[-1]).state.step if found else 0


def wait_for_step(job: Job, run_dir: Path, step: int) -> None:
    """Return as soon as the run has reported a step."""
    deadline = time.monotonic() + LIMIT_S
    while last_step(run_dir) < step:
        assert time.monotonic() < deadline, job.text
        time.sleep(0.002)
