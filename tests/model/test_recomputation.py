"""Layers are recomputed for a backward pass, and in no other."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launch import run_ranks

WORKER = "tests.model.recomputation_workers:checkpointed_layers"


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"pipeline": 2})], ids=str)
def test_passes_without_gradients_checkpoint_nothing(ranks: int, layout: dict[str, Any]) -> None:
    [found] = run_ranks(WORKER, ranks, [layout])
    for with_gradients, without, logits, is_training in found:
        assert with_gradients > 0 and (without, logits) == (0, 0) and is_training
