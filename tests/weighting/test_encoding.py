"""The weighting model's own encoder in chunks gives the gradient of all samples at once."""

from __future__ import annotations

import pytest
import torch

from tests.launch import run_ranks
from tests.weighting.encoding_workers import MICRO_BATCH
from tests.weighting.workers import SAMPLES

WORKER = "tests.weighting.encoding_workers:update_and_one_shot"
CASES = {
    1: [
        {"group": group, "bf16": bf16}
        for group in ("micro_batch", "global")
        for bf16 in (False, True)
    ],
    2: [
        {"group": group, **layout}
        for group in ("micro_batch", "global")
        for layout in ({}, {"tensor": 2}, {"context": 2})
    ],
}


@pytest.fixture(scope="module")
def found() -> list[tuple[dict, list[dict]]]:
    pairs = []
    for size, cases in CASES.items():
        pairs += zip(cases, run_ranks(WORKER, size, cases), strict=True)
    return pairs


def _relative(rank: dict) -> float:
    return float((rank["gradient"] - rank["at once"]).norm() / rank["at once"].norm())


def test_gradient_is_that_of_all_samples_at_once(found: list) -> None:
    for case, ranks in found:
        for rank in ranks:
            if not case.get("bf16"):
                # The same sums in another order.
                assert _relative(rank) < 1e-6, case


def test_products_in_bf16_leave_the_gradient_near_fp32s(found: list) -> None:
    """bf16 keeps 8 bits, 4e-3 of a value, in each of a dozen products between tokens and loss; and
    the weights are far from uniform here, so a small change of a logit counts.
    """
    errors = [_relative(rank) for case, ranks in found if case.get("bf16") for rank in ranks]
    assert len(errors) == 2 and all(1e-4 < error < 0.1 for error in errors), errors
    for case, ranks in found:
        assert all(rank["gradient"].dtype == torch.float32 for rank in ranks), case


def test_no_more_than_a_micro_batch_is_encoded_at_once(found: list) -> None:
    for case, ranks in found:
        share = SAMPLES // len(ranks)  # of a replica's samples, or of the ranks of a replica
        for rank in ranks:
            chunks = [MICRO_BATCH] * (share // MICRO_BATCH)
            assert rank["rows of weights"] == chunks, case
            # Forward, and forward again on the way back.
            assert rank["rows of update"] == chunks * 2, case
            # Three passes and the encoder's forward pass again, which weighting/costs.py counts;
            # attention across samples, up to a fifth of this small model, is not run again.
            assert 3.75 < rank["flops"] < 4, case
