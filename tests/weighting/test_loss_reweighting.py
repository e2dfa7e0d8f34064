"""loss_reweighting against its equations, in one process and on two replicas."""

from __future__ import annotations

import pytest
import torch

from tests.launch import run_ranks

WORKERS = "tests.weighting.loss_workers"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("group", ["micro_batch", "global"])
def test_weights_follow_the_running_moments(world_size: int, group: str) -> None:
    [ranks] = run_ranks(f"{WORKERS}:weights_and_by_hand", world_size, [{"group": group}])
    for found in ranks:
        assert torch.equal(found["first"], torch.ones_like(found["first"]))
        # float32 losses of size 1 to 5; the moments are in double precision.
        torch.testing.assert_close(found["ours"], found["by hand"], rtol=1e-5, atol=1e-6)
        assert float(found["ours"].std()) > 0.1
        assert torch.equal(found["ours"], found["after loading"])


def test_a_broken_batch_sets_no_temperature() -> None:
    [[found]] = run_ranks(f"{WORKERS}:after_a_broken_batch", 1, [{}])
    assert found == (True, False)


def test_an_older_checkpoint_has_no_temperature() -> None:
    [[found]] = run_ranks(f"{WORKERS}:needs_after_an_older_checkpoint", 1, [{}])
    assert found is True


def test_equal_losses_weigh_the_same() -> None:
    [[found]] = run_ranks(f"{WORKERS}:weights_of_equal_losses", 1, [{}])
    assert torch.equal(found, torch.ones_like(found))
