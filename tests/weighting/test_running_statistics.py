"""Running statistics of features against their formula, one process."""

from __future__ import annotations

import torch

from tests.launch import run_ranks
from tests.weighting.statistics_workers import ROWS, SIZES, WIDTH

WORKER = "tests.weighting.statistics_workers:after_batches"


def by_hand(sized: bool) -> torch.Tensor:
    """Mean and deviation after three batches of 8 rows, in double precision."""
    mean, variance = None, None
    for rows in ROWS.double():
        share = (SIZES.double() if sized else torch.ones(len(rows)).double())[:, None]
        share = share / share.sum()
        now = (share * rows).sum(0)
        spread = (share * rows.square()).sum(0) - now.square()
        three = torch.stack([spread[:WIDTH].mean(), spread[WIDTH:-1].mean(), spread[-1]])
        mean = now if mean is None else 0.9 * mean + 0.1 * now
        variance = three if variance is None else 0.9 * variance + 0.1 * three
    return torch.cat([mean, variance.sqrt()])


def test_statistics_are_those_of_the_batches_so_far_on_every_layout() -> None:
    for sized in (False, True):
        for size in (1, 2):
            [ranks] = run_ranks(WORKER, size, [{"sized": sized}])
            for found in ranks:
                torch.testing.assert_close(found.double(), by_hand(sized), rtol=1e-5, atol=1e-6)
