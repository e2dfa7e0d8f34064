"""Options of the whole test suite."""

from __future__ import annotations

import pytest

# By processor time; begun first, so that no worker is left alone with one of them at the end.
LONGEST = (
    *("test_jobs.py", "test_quickstart.py", "test_faults.py", "test_runs.py", "test_benchmark.py"),
    *("test_evaluate.py", "test_measured.py", "test_features.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tests that need more than a checkout run only when asked."""
    parser.addoption(
        "--real-weights",
        action="store_true",
        help="also run the tests that fetch a public model (93 MB)",
    )
    parser.addoption("--long", action="store_true", help="also run the long mode of tests")
    parser.addoption("--fault-table", metavar="FILE", help="write what faults were survived")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in their order, but the longest before the others; tests/run.sh deals them out so."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
