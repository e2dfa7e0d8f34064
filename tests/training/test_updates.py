"""Updates inside a step: where nothing is known of the batch, and where the step is skipped."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launch import run_ranks

WORKERS = "tests.training.update_workers:"


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (2, {}), (2, {"pipeline": 2})], ids=str)
def test_without_a_known_alignment_there_is_no_update(size: int, layout: dict[str, Any]) -> None:
    """All weight is on samples that were not probed."""
    [ranks] = run_ranks(WORKERS + "updates_by_probed_fraction", size, [layout])
    for found in ranks:
        assert found == [(0, False), (1, True)]


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"sharded": True})], ids=str)
def test_a_skipped_step_changes_nothing_and_tells_its_update(
    ranks: int, layout: dict[str, Any]
) -> None:
    [found] = run_ranks(WORKERS + "update_of_a_skipped_step", ranks, [layout])
    assert found == [(1, False, True, True)] * ranks


def test_an_update_that_is_not_finite_on_one_rank_is_made_on_none() -> None:
    [found] = run_ranks(WORKERS + "update_where_one_rank_is_not_finite", 2, [{}])
    assert found == [(0, False)] * 2
    cases = [{"broken": rank} for rank in (1, -1)]
    found = run_ranks(WORKERS + "finite_alignments_of_all", 2, cases)
    assert found == [[False, False], [True, True]]
