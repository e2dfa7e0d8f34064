"""Options of the whole test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tests that need more than a checkout run only when asked."""
    parser.addoption(
        "--real-weights",
        action="store_true",
        help="also run the tests that fetch a public model (93 MB)",
    )
    parser.addoption("--long", action="store_true", help="also run the long mode of tests")
    parser.addoption("--fault-table", metavar="FILE", help="write what faults were survived")
