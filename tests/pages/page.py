"""What a page has: its links, its commands one by one, and the messages that it explains."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
DOCS = REPOSITORY / "docs"
TASKS = ("first_run", "your_data", "your_target", "your_method", "many_machines")
# How a line of a shell block begins; blocks of output begin otherwise.
_PROGRAMS = ("python", "bash", "torchrun", "cp", "mkdir", "awk", ".", "STEPS=200")


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: Path

    @property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text(encoding="utf-8")

    def blocks(self, language: str = "") -> list[str]:
        """Returns the fenced blocks of a language; "" for those without."""
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", self.text, re.DOTALL | re.MULTILINE)
        return [block for name, block in fenced if name == language]

    def scripts(self) -> list[str]:
        """Returns the blocks that a reader runs."""
        return [block for block in self.blocks() if block.split()[0] in _PROGRAMS]

    def commands(self) -> Iterator[list[str]]:
        """Yields the words of every command."""
        for block in self.scripts():
            for line in block.replace("\\\n", " ").splitlines():
                yield shlex.split(line, comments=True)

    def links(self) -> list[str]:
        """Returns the files that the page links to, relative to it; pictures are left out."""
        targets = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)", self.text)
        return [target for target in targets if "://" not in target]

    def messages(self) -> list[str]:
        """Returns what the table "What can go wrong" explains; ... stands for anything."""
        return re.findall(r"^\| `((?:error|warning): .*?)` \| ", self.text, re.MULTILINE)


def task(name: str) -> Page:
    """Returns a page of docs/ by its name without .md."""
    return Page(DOCS / f"{name}.md")
