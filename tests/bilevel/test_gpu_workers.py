"""Functions of the GPU tests, on CPUs: a mistake in them costs a GPU's time.

FP8 is emulated, which has no scales to leave behind.
"""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize("context", [1, 2])
def test_attention_stops_at_borders(context: int) -> None:
    case = {"precision": "bf16", "context": context}
    [ranks] = run_ranks(WORKERS + "borders", context, [case])
    for stops, finding in ranks:
        assert stops, finding
