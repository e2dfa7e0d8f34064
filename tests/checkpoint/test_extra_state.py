"""A checkpoint of Megatron-Core's own layers in layers that keep more beside their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.launch import run_ranks

WORKER = "tests.checkpoint.extra_state_workers:loaded_into_norms_with_more_state"


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"pipeline": 2})], ids=str)
def test_norms_keep_what_the_checkpoint_does_not_have(
    ranks: int, layout: dict[str, Any], tmp_path: Path
) -> None:
    [found] = run_ranks(WORKER, ranks, [{"folder": str(tmp_path / "saved"), **layout}])
    assert found == [(True, {7}, 0)] * ranks
