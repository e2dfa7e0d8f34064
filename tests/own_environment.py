"""For tests that change this process's environment through what they call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def kept_environment() -> Iterator[None]:
    """Put the environment back: a process group leaves its address in it, an evaluation offline."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """No test of the folder hands its environment on."""
    with kept_environment():
        yield
