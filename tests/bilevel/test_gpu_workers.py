"""The functions of the GPU tests, on CPUs in emulated FP8: a mistake in them costs a GPU's time."""

from __future__ import annotations

from tests.launch import run_ranks

WORKERS = "tests.gpu.workers:"
CASE = {"precision": "bf16", "fp8_emulation": True}


def test_the_virtual_step_changes_the_validation_loss_and_leaves() -> None:
    [[losses]] = run_ranks(WORKERS + "stale_weights", 1, [CASE])
    assert losses["stepped"] != losses["before"]
    assert losses["after"] == losses["before"]


def test_an_update_leaves_nothing_behind() -> None:
    [[parts]] = run_ranks(WORKERS + "left_behind", 1, [CASE])
    assert all(parts.values()), parts


def test_attention_stops_at_borders() -> None:
    [[(stops, finding)]] = run_ranks(WORKERS + "borders", 1, [{"precision": "bf16"}])
    assert stops, finding
