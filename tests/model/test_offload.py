"""A model in host memory between its uses: freed meanwhile, and the same bit for bit after."""

from __future__ import annotations

import pytest

from tests.launch import run_ranks

LAYOUTS = [
    ({}, 1),
    ({"precision": "bf16"}, 1),
    ({"sharded": True}, 2),
    ({"sharded": True, "precision": "bf16"}, 2),
    ({"tensor": 2, "sequence": True}, 2),
    ({"pipeline": 2, "virtual_stages": 2, "layers": 4}, 2),
]


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS, ids=str)
def test_uses_are_those_of_a_model_that_stays(layout: dict, ranks: int) -> None:
    run_ranks("tests.model.offload_workers:uses", ranks, [layout], limit_s=90)
