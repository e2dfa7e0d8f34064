"""Messages name a command as the reader can type it: from a clone, or from the installed package.

tests/packaging reads the same messages where only the wheel is installed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dwm.files.command_names import TOOLS, name_of_command

REPOSITORY = Path(__file__).parent.parent.parent
PACKAGE = REPOSITORY / "megatron_dwm"
# A file in tools/ by its name, which only a clone has.
OF_A_CLONE = re.compile("tools/|" + "|".join(rf"\b{file}\.py\b" for file in TOOLS.values()))


@pytest.mark.parametrize("name", TOOLS)
def test_a_clone_has_the_file(name: str) -> None:
    python, file = name_of_command(name).split(" ")
    assert python == "python" and (REPOSITORY / file).is_file()


def test_every_installed_command_has_a_name() -> None:
    """But for those that are modules in a clone, too."""
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    commands = dict(re.findall(r'^megatron-dwm-(\w+) = "megatron_dwm\.([\w.]+):', project, re.M))
    del commands["pretrain"], commands["doctor"]
    assert commands == {name: f"commands.{file}" for name, file in TOOLS.items()}


def _shown_strings(file: Path) -> Iterator[str]:
    """All strings of a module but its docstrings; those of fields are help texts, and count."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.stem)
def test_no_message_names_a_file_that_only_a_clone_has(file: Path) -> None:
    if file.name == "command_names.py":
        return
    assert not [text for text in _shown_strings(file) if OF_A_CLONE.search(text)]
