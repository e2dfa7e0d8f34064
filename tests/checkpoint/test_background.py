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
