"""The tests of two releases of Megatron-Core run only through tests/compat/run.sh."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def two_releases() -> None:
    """Skip unless run.sh has prepared the second release."""
    if "MEGATRON_DWM_COMPAT" not in os.environ:
        pytest.skip("run by tests/compat/run.sh, which prepares another release of Megatron-Core")
