"""GPU tests say how many GPUs they need; with fewer they are skipped with that reason."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def enough_gpus(request: pytest.FixtureRequest) -> None:
    """Skip if the machine has fewer GPUs than the test's mark names (1 without a number)."""
    mark = request.node.get_closest_marker("gpu")
    assert mark is not None, "every test of this folder carries the mark gpu"
    wanted, found = mark.args[0] if mark.args else 1, torch.cuda.device_count()
    if found < wanted:
        pytest.skip(f"needs {wanted} GPU, this machine has {found}")
