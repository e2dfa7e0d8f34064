"""Links lead somewhere, and every command has programs, files, options and keys that exist."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_dwm.config.names import known_keys
from tests.pages.page import DOCS, REPOSITORY, TASKS, Page, task

INDEX = Page(DOCS / "README.md")
EVERY_PAGE = [Page(path) for path in sorted(DOCS.glob("*.md"))]
README = Page(REPOSITORY / "README.md")
WITH_COMMANDS = [README, *map(task, TASKS)]
# These take the keys of a run.
OF_A_RUN = ("megatron_dwm.pretrain", "megatron_dwm.doctor", "tools/plan.py", "pretrain")
OURS = tuple(f"{path.name}/" for path in REPOSITORY.iterdir() if path.is_dir())
LIMIT_S = 60


def _name(page: Page) -> str:
    return page.path.name


@pytest.mark.parametrize("page", [README, *EVERY_PAGE], ids=_name)
def test_links_lead_to_files(page: Page) -> None:
    assert [link for link in page.links() if not (page.path.parent / link).exists()] == []


def test_the_index_has_every_page_once() -> None:
    listed = [link for link in INDEX.links() if "/" not in link]
    assert len(listed) == len(set(listed))
    assert {*listed, "README.md"} >= {page.path.name for page in EVERY_PAGE}


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=_name)
def test_every_file_of_a_command_exists(page: Page) -> None:
    commands = list(page.commands())
    assert commands
    for words in commands:
        named = [word for word in words if word.startswith(OURS)]
        missing = [word for word in named if not (REPOSITORY / word).exists()]
        assert not missing, words


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=_name)
def test_every_option_of_a_command_exists(page: Page) -> None:
    for words in page.commands():
        keys = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        if any(word in OF_A_RUN for word in words):
            keys -= set(known_keys())
        assert not {key for key in keys if f"--{key}" not in _options(tuple(words))}, words


def _options(words: tuple[str, ...]) -> str:
    """Returns the help texts of the programs of a command."""
    text = ""
    if words[0] == "torchrun":
        text += _help("-m", "torch.distributed.run")
    if "slurm/submit.sh" in words:
        # sbatch's own, and the tool that the job starts; sbatch is not installed here.
        text += "--array --nodes"
        tools = {"preprocess": "preprocess_data", "merge": "merge_datasets"}
        text += "".join(_help(f"tools/{tools[word]}.py") for word in words if word in tools)
        assert any((REPOSITORY / "slurm" / f"{word}.sbatch").is_file() for word in words), words
    programs = [word for word in words if word.startswith("tools/") and word.endswith(".py")]
    return text + "--help" + "".join(_help(program) for program in programs)


@cache
def _help(*program: str) -> str:
    command = [sys.executable, "-W", "ignore", *program, "--help"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    return done.stdout


def test_the_block_of_the_method_is_a_method() -> None:
    """Its class is in the command that trains with it."""
    page = task("your_method")
    [block] = page.blocks("python")
    compile(block, "my_method.py", "exec")
    assert "class DistinctTokens(" in block and "my_method:DistinctTokens" in page.text


def test_pages_are_found_from_the_readme() -> None:
    assert {f"docs/{name}.md" for name in TASKS} <= set(README.links())
    assert "docs/README.md" in README.links() and Path(DOCS / "README.md").is_file()
