"""A reader's afternoon: the pages' own commands, one page after the other, in an empty folder.

first_run.md has the quickstart, which tests/test_quickstart.py runs; many_machines.md's first two
commands run here in two processes.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.pages.page import REPOSITORY, Page, task

LIMIT_S = 400
TRY = ("tools", "examples", "megatron_dwm")


def _bash(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def _follow(folder: Path, page: Page, *, only: str = "") -> str:
    """Run a page's commands as they stand, but for the environment; returns what they print."""
    scripts = [block for block in page.scripts() if not block.startswith(". tools/environment.sh")]
    printed = ""
    for script in (script for script in scripts if only in script):
        done = _bash(folder, script)
        assert done.returncode == 0, script + done.stdout + done.stderr
        printed += done.stdout
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which somebody has followed your_data.md; the clone's folders are links."""
    found = tmp_path_factory.mktemp("clone")
    for name in TRY:
        (found / name).symlink_to(REPOSITORY / name)
    page = task("your_data")
    printed = _follow(found, page)
    [last] = [block for block in page.blocks() if block.startswith("data/my_text_document: ")]
    assert last in printed, "the page shows another last line"
    return found


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The same folder after your_target.md: a run with weights, one without, their report."""
    printed = _follow(folder, task("your_target"))
    assert "step 300/300" in printed and "step 300 held-out loss: " in printed
    return folder


def test_your_target_ends_as_its_page_says(trained: Path) -> None:
    for run in ("my", "uniform"):
        assert (trained / f"runs/{run}/metrics.jsonl").is_file()
    assert any((trained / "runs/my/report").iterdir())


def test_your_method(folder: Path) -> None:
    page = task("your_method")
    [code] = page.blocks("python")
    (folder / "my_method.py").write_text(code, encoding="utf-8")
    assert "step 100/100" in _follow(folder, page)


def test_many_machines_here(trained: Path) -> None:
    """Two processes, then one that goes on; the plan. The cluster has tests of its own."""
    page = task("many_machines")
    assert "step 60/60" in (printed := _follow(trained, page, only="runs/two")), printed
    assert "step 80/80" in printed
    [line] = [block for block in page.blocks() if block.startswith("64 x h100")]
    assert _follow(trained, page, only="tools/plan.py") == line


# The page of a mistake, and how to make it.
DATA = (
    "python tools/preprocess_data.py --output-prefix data/x --append-eod "
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model data/my.model --input "
)
RUN = (
    "python -m megatron_dwm.pretrain examples/tiny.yaml --run.dir runs/x --training.steps 2 "
    "--data.train data/my_text_document --data.tokenizer data/my.model --evaluation.path null "
)
TARGET = "--validation.path data/target.jsonl "
MISTAKES = [
    ("your_data", f"echo '{{\"content\": 1}}' >my.jsonl; {DATA} my.jsonl"),
    ("your_data", f"(head -n 3 data/train.jsonl; echo '{{\"text\": ') >my.jsonl; {DATA} my.jsonl"),
    ("your_data", f"echo text >plain.txt; {DATA} plain.txt"),
    ("your_data", f"{DATA} data/train.jsonl --metadata-keys domian; false"),
    ("your_data", f"{DATA} data/train.jsonl --output-prefix data/my"),
    ("your_data", f"{DATA} data/train.jsonl".replace("data/x", "deeper/x")),
    (
        "your_data",
        "python tools/train_tokenizer.py --vocab-size 32000 "
        "--input data/train.jsonl --output data/b.model",
    ),
    ("your_target", f"echo '{{}}' >data/none.jsonl; {RUN} --validation.path data/none.jsonl"),
    ("your_target", f"{RUN} {TARGET} --evaluation.path data/target.jsonl"),
    ("your_target", f"{RUN} {TARGET} --data.train data/my"),
    ("your_target", f"{RUN} {TARGET} --run.dir runs/my"),
    ("your_target", f"{RUN} {TARGET} --policy.name uniform"),
    ("your_target", f"{RUN} {TARGET}; false"),
    ("your_method", f"{RUN} --policy.name mymethod:DistinctTokens"),
    ("your_method", f"{RUN} --policy.name my_method:Distinct"),
    ("many_machines", f"torchrun --nproc-per-node 2 -m {RUN[9:]} {TARGET} --parallel.tensor 4"),
    ("many_machines", f"{RUN} {TARGET} --training.global_batch_size 33"),
]


@pytest.mark.parametrize(("name", "script"), MISTAKES)
def test_a_mistake_says_what_its_page_says(trained: Path, name: str, script: str) -> None:
    (trained / "my_method.py").write_text(task("your_method").blocks("python")[0])
    done = _bash(trained, script)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if re.match("(error|warning): ", line)]
    messages = task(name).messages()
    assert messages and any(_says(line, message) for line in said for message in messages), said


def _says(line: str, message: str) -> bool:
    """True if the page has the line; its numbers and paths are those of another example."""

    def plain(text: str) -> str:
        return re.sub(r"[\w./-]*[\d/][\w./-]*", "N", text)

    parts = [re.escape(part) for part in plain(message).split("...")]
    return re.fullmatch(".*".join(parts), plain(line)) is not None
