"""Files and command lines that the preprocessing tests share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forking.client import run_python

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def corpus_dir() -> Path:
    """The corpus that the repository ships."""
    return ROOT / "examples" / "corpus"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """What Megatron-LM's own tool wrote."""
    path = SHARED / "megatron_golden"
    if not path.is_dir():
        pytest.skip("shared/data/megatron_golden is not at hand")
    return path


@pytest.fixture(scope="session")
def golden_model(golden_dir: Path) -> Path:
    """The tokenizer that the golden files were made with."""
    return golden_dir.parent / "tokenizer_32k.model"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> Path:
    """A tokenizer of 600 pieces."""
    from megatron_dwm.preprocess.read.texts import read_texts
    from megatron_dwm.tokenizer import train_sentencepiece

    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    texts = read_texts([str(corpus_dir / "validation.jsonl")], "text")
    train_sentencepiece(texts, vocab_size=600, output=path)
    return path


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a script of tools/ with a user's arguments."""

    def run_tool(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run_python([f"tools/{tool}", *map(str, arguments)])

    return run_tool


@pytest.fixture(scope="session")
def run_fresh() -> Run:
    """The same in a fresh interpreter, as users do: it costs a second."""

    def run_tool(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run_python([f"tools/{tool}", *map(str, arguments)], fresh=True)

    return run_tool
