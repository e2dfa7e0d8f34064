"""Process groups have the configured timeout, in real jobs over gloo."""

from __future__ import annotations

import pytest

from tests.launch import run_ranks


@pytest.mark.parametrize("timeout_s", [15, 119])
def test_every_group_has_the_timeout_that_was_asked_for(timeout_s: int) -> None:
    """The world's, Megatron-Core's and our own groups notice a dead peer in that time."""
    case = {"tensor": 1, "pipeline": 2, "timeout_s": timeout_s}
    [ranks] = run_ranks("tests.runtime.workers:timeouts_s", 2, [case])
    for found in ranks:
        assert len(found) > 3 and set(found) == {timeout_s}
