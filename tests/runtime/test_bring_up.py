"""Process groups as the configuration asks for them, in real jobs over gloo."""

from __future__ import annotations

import pytest

from tests.launch import run_ranks


@pytest.mark.parametrize("timeout_s", [15, 119])
def test_every_group_has_the_timeout_that_was_asked_for(timeout_s: int) -> None:
    """The world's, Megatron-Core's and ours: a dead peer is noticed after so many seconds."""
    case = {"tensor": 1, "pipeline": 2, "timeout_s": timeout_s}
    [ranks] = run_ranks("tests.runtime.workers:timeouts_s", 2, [case])
    for found in ranks:
        assert len(found) > 3 and set(found) == {timeout_s}
