"""Rules that a test can check: which folder imports which, and how large files may become."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import NOT_SLOW, SLOW

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "megatron_dwm"

# A folder may import itself, and of those above it in this table the ones named here. Four rows
# are modules: launch.py, entry.py, plugin.py and testing.py; pretrain.py stands above everything.
ALLOWED: dict[str, set[str]] = {
    "files": set(),
    "config": {"files"},
    "tokenizer": {"files", "config"},
    "launch": {"config"},
    "entry": {"config", "launch"},
    "runtime": {"config", "launch"},
    "model": {"files", "config", "runtime"},
    "data": {"files", "config", "tokenizer", "runtime", "model"},
    "weighting": {"config", "tokenizer", "runtime", "model", "data"},
    "plugin": {"config", "tokenizer", "runtime", "model", "data", "weighting"},
    "bilevel": {"runtime", "model"},
    "library": {"runtime", "model", "bilevel"},
    "checkpoint": {"files", "config", "tokenizer", "runtime", "model", "data", "weighting"},
    "training": {"config", "runtime", "model", "data", "weighting", "bilevel"},
    "run": {
        *("files", "config", "tokenizer", "runtime", "model", "data", "weighting", "checkpoint"),
        "training",
    },
    "testing": {"config", "runtime", "model", "data", "training"},
    "planning": {"config", "data", "model", "weighting"},
    "doctor": {
        *("config", "runtime", "model", "data", "weighting", "bilevel", "checkpoint", "training"),
        *("run", "testing"),
    },
    "preprocess": {"files", "config", "tokenizer", "launch"},
    "selection": {
        *("files", "config", "tokenizer", "runtime", "model", "data", "weighting", "checkpoint"),
        *("run", "preprocess"),
    },
    "convert": {"files", "config", "tokenizer", "runtime", "model", "checkpoint"},
    "evaluation": {"files", "config"},
    "report": {"files", "config", "tokenizer", "selection"},
    "commands": {
        *("files", "config", "run", "planning", "preprocess", "selection", "convert"),
        *("evaluation", "report", "tokenizer", "weighting", "entry"),
    },
}
MAX_CLASS_LINES = 150
# Imported by one file of the package at most.
ONE_FILE = (
    "transformer_engine",
    "apex",
    "transformers",
    "lm_eval",
    "datasets",
    "altair",
    "vl_convert",
    "wandb",
)
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _all_files() -> list[Path]:
    folders = ("tools", "examples", "tests")
    return _files() + sorted(f for d in folders for f in (REPOSITORY / d).rglob("*.py"))


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _row(file: Path) -> str:
    """Returns the row of the table that a file of the package falls under, if there is one."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _may_import(folder: str, module: str) -> bool:
    target = module.removeprefix("megatron_dwm.")
    names = ALLOWED[folder] | {folder}
    return any(target == name or target.startswith(f"{name}.") for name in names)


@pytest.mark.parametrize("file", _files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file: Path) -> None:
    row = _row(file)
    if row not in ALLOWED or file.name == "__main__.py":  # entry points stand above everything
        return
    ours = {name for name in _imports(file) if name.startswith("megatron_dwm.")}
    wrong = {name for name in ours if not _may_import(row, name)}
    assert not wrong, f"{row} may not import {sorted(wrong)}"


def test_no_folder_may_import_what_it_does_not() -> None:
    imported: dict[str, set[str]] = {folder: set() for folder in ALLOWED}
    for file in _files():
        ours = [name for name in _imports(file) if name.startswith("megatron_dwm.")]
        if _row(file) in ALLOWED:
            imported[_row(file)] |= {name.split(".")[1] for name in ours}
    unused = {folder: ALLOWED[folder] - imported[folder] for folder in ALLOWED}
    assert not any(unused.values()), unused


def test_arrows_point_one_way() -> None:
    """No folder may import one that stands below it in the table, so there is no circle."""
    order = list(ALLOWED)
    for folder, above in ALLOWED.items():
        assert all(order.index(other) < order.index(folder) for other in above), folder


def test_every_folder_has_a_rule() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ALLOWED) - {"launch", "entry", "plugin", "testing"}


def test_relative_imports_are_not_used() -> None:
    for file in _files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), file


@pytest.mark.parametrize("library", ONE_FILE)
def test_library_has_one_door(library: str) -> None:
    doors = [f for f in _files() if any(name.split(".")[0] == library for name in _imports(f))]
    assert len(doors) <= 1, doors


def test_only_runtime_knows_parallel_state_and_cuda() -> None:
    for file in _files():
        if file.relative_to(PACKAGE).parts[0] == "runtime":
            continue
        text = file.read_text(encoding="utf-8")
        assert "parallel_state" not in text.replace("megatron.core.parallel_state", ""), file
        assert not any("parallel_state" in name for name in _imports(file)), file
        assert "torch.cuda." not in text, file


def test_planning_starts_nothing() -> None:
    for file in (PACKAGE / "planning").glob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in _imports(file)), file


def test_slow_and_fast_tests_exist() -> None:
    for name in (*SLOW, *NOT_SLOW):
        assert (REPOSITORY / "tests" / name).exists(), name
    assert all(name.startswith(SLOW) for name in NOT_SLOW)


def test_report_never_imports_torch() -> None:
    for file in (PACKAGE / "report").rglob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in _imports(file)), file


@pytest.mark.parametrize("file", _all_files(), ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_sizes_and_signatures(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
            assert node.returns is not None, node.name
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < MAX_CLASS_LINES, node.name
