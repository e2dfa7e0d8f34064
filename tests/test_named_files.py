"""Files that documents, docstrings and comments name are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "megatron_dwm"
# A path with a folder and an ending that this repository has.
NAMED = re.compile(r"(?<![\w./-])((?:[\w-]+/)+[\w-]+\.(?:py|md|sh|yaml))\b")
# What begins otherwise is a file of another project or of a run.
OURS = {path.name for root in (REPOSITORY, PACKAGE) for path in root.iterdir() if path.is_dir()}
# Sections of the documents that code cites.
CITED = re.compile(r"METHOD(?:\.md)?, sections? (\d+)")


def _texts() -> list[Path]:
    code = [
        f for d in ("megatron_dwm", "tools", "examples") for f in (REPOSITORY / d).rglob("*.py")
    ]
    documents = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    return sorted([*code, *documents, *(REPOSITORY / "examples").glob("*.sh")])


def _missing(file: Path) -> Iterator[str]:
    for name in NAMED.findall(file.read_text(encoding="utf-8")):
        if name.split("/")[0] not in OURS:
            continue
        roots = (REPOSITORY, PACKAGE, file.parent, PACKAGE / file.parent.name, REPOSITORY / "tools")
        if not any((root / name).exists() for root in roots):
            yield name


@pytest.mark.parametrize("file", _texts(), ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_named_files_exist(file: Path) -> None:
    assert not list(_missing(file))


def test_cited_sections_exist() -> None:
    method = (REPOSITORY / "docs" / "METHOD.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (\d+)", method, re.MULTILINE))
    for file in _texts():
        cited = set(CITED.findall(file.read_text(encoding="utf-8")))
        assert cited <= sections, (file, cited - sections)


def test_code_cites_no_document_that_is_not_here() -> None:
    for file in _texts():
        assert "DESIGN" not in file.read_text(encoding="utf-8"), file
