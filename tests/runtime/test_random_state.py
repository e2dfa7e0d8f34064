"""Random generators of a checkpoint that another kind of device has written."""

from __future__ import annotations

import pytest
import torch

from tests.launch import run_ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="the state is a GPU's own here")
def test_a_gpus_state_leaves_a_cpus_generators() -> None:
    """It has another size, which a generator would refuse at its next use."""
    [[found]] = run_ranks("tests.runtime.workers:forked_after_a_gpus_state", 1, [{}])
    assert found == (True, True)
