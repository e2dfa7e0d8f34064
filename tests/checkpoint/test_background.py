"""A checkpoint written while training goes on has the state of the step that asked for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.launch import run_ranks

WORKER = "tests.checkpoint.background_workers:saved_while_training"


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, {}), (1, {"precision": "bf16"}), (2, {"sharded": True}), (2, {"pipeline": 2})],
    ids=str,
)
def test_nothing_of_a_later_step_is_in_it(
    ranks: int, layout: dict[str, Any], tmp_path: Path
) -> None:
    [found] = run_ranks(WORKER, ranks, [{"run_dir": str(tmp_path), **layout}])
    assert found == [(True, True, True)] * ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_thread_that_ends_early_is_a_failure(ranks: int, tmp_path: Path) -> None:
    """Without memory, for example; a checkpoint without one rank's files must not get its name."""
    worker = "tests.checkpoint.background_workers:save_without_memory"
    [found] = run_ranks(worker, ranks, [{"run_dir": str(tmp_path)}])
    for said, left in found:
        assert "the thread that writes the files ended early" in said and left == []
