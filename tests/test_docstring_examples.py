"""Every example in a docstring of the package is run, and prints what it says."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "megatron_dwm"
WITH_EXAMPLES = sorted(
    path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")
)


def _written(path: Path) -> int:
    """Returns the number of statements with a prompt in a module's docstrings, by its source."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    lines = [line.strip() for text in texts if text for line in text.splitlines()]
    return sum(line.startswith(">>> ") for line in lines)


def test_there_are_examples() -> None:
    assert len(WITH_EXAMPLES) >= 20


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_examples_print_what_they_say(path: Path) -> None:
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0, "the comparison is printed above"
    # doctest passes over what it does not find, such as functions behind a decorator.
    assert found.attempted == _written(path) > 0
