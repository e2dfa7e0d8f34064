"""The signature tests run only on request."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def asked_for(request: pytest.FixtureRequest) -> None:
    """Skip without `-m signatures`, because these tests need packages that no other test needs."""
    if "signatures" not in request.config.getoption("-m"):
        pytest.skip("asked for with -m signatures, after tests/signatures/prepare.sh")
