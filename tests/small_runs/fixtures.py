"""A small corpus, made once by the project's own tools, for runs from the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
import zstandard

from tests.small_runs.command import RESUME
from tests.small_runs.forked import Server

REPOSITORY = Path(__file__).parent.parent.parent
CORPUS = REPOSITORY / "examples" / "corpus"
ROWS = 150


@dataclass(frozen=True)
class Corpus:
    """Preprocessed text and what a run needs beside it."""

    prefix: str
    tokenizer: str

    def arguments(self) -> list[str]:
        """Options of a run on this corpus, small enough for a test.

        They stand in a file, which tests of all policies share: there, a key without effect is a
        warning.
        """
        data = {"train": [self.prefix], "tokenizer": self.tokenizer}
        online = {"mode": "online", "interval_steps": 3, "warmup_steps": 5}
        exact = {"update_on": "fresh", "across_samples": True}
        sections = {
            "data": {**data, "sequence_length": 32, "domain_key": "domain"},
            "validation": {"path": str(CORPUS / "validation.jsonl")},
            "training": {"global_batch_size": 8, "micro_batch_size": 4, "steps": 20},
            "logging": {"tensorboard": False},
            "weighting": {**online, **exact, "group": "global"},
        }
        file = Path(f"{self.prefix}.yaml")
        file.write_text(yaml.safe_dump(sections))
        return ["--config", str(file)]

    def held_out(self) -> list[str]:
        """Options of evaluation on every 16th passage of the held-out text, of all its domains."""
        file = Path(f"{self.prefix}.held_out.jsonl")
        lines = (CORPUS / "heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[::16]), encoding="utf-8")
        return ["--evaluation.path", str(file)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.jsonl"
    with zstandard.open(CORPUS / "train.jsonl.zst", "rt", encoding="utf-8") as lines:
        text.write_text("".join(line for line, _ in zip(lines, range(ROWS), strict=False)))
    model = folder / "tokenizer.model"
    _tool("train_tokenizer.py", "--input", text, "--vocab-size", "512", "--output", model)
    return preprocessed(text, model)


@pytest.fixture(scope="session")
def short(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The beginnings of documents, of one character to some rows' length."""
    file = tmp_path_factory.mktemp("short") / "short.jsonl"
    with zstandard.open(CORPUS / "train.jsonl.zst", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(400), strict=False)]
    for number, record in enumerate(records):
        record["text"] = record["text"][: 1 + number * number % 500]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return preprocessed(file, corpus.tokenizer)


def preprocessed(text: Path, model: Path | str) -> Corpus:
    """Tokenize a JSON Lines file of documents, into files beside it."""
    prefix = text.with_suffix("")
    _tool(
        "preprocess_data.py",
        *("--input", text, "--output-prefix", prefix),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model),
        *("--append-eod", "--metadata-keys", "domain"),
    )
    return Corpus(f"{prefix}_text_document", str(model))


def _tool(name: str, *arguments: object) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("logs"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def stopped(
    server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], Path]:
    """(run, its arguments, folder of its own copies of data, tokenizer and target)."""
    folder = tmp_path_factory.mktemp("stopped")
    for end in ("bin", "idx", "meta.parquet"):
        shutil.copy(f"{corpus.prefix}.{end}", folder / f"data.{end}")
    shutil.copy(corpus.tokenizer, folder / "tokenizer.model")
    shutil.copy(CORPUS / "validation.jsonl", folder / "validation.jsonl")
    arguments = [*corpus.arguments(), "--policy.name", "dwm", "--training.steps", "2"]
    arguments += ["--data.train", str(folder / "data")]
    arguments += ["--data.tokenizer", str(folder / "tokenizer.model")]
    # In a file: a test resumes the run with a policy that reads no target.
    target = {"validation": {"path": str(folder / "validation.jsonl")}}
    (folder / "target.yaml").write_text(yaml.safe_dump(target))
    arguments += ["--config", str(folder / "target.yaml")]
    server.succeed(folder / "run", arguments)
    return folder / "run", [*arguments, *RESUME, "--training.steps", "3"], folder
