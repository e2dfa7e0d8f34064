"""A small corpus, made once by the project's own tools, for runs from the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

REPOSITORY = Path(__file__).parent.parent.parent
CORPUS = REPOSITORY / "examples" / "corpus"
ROWS = 150


@dataclass(frozen=True)
class Corpus:
    """Preprocessed text and what a run needs beside it."""

    prefix: str
    tokenizer: str

    def arguments(self) -> list[str]:
        """Options of a run on this corpus, small enough for a test."""
        return [
            *("--data.train", self.prefix, "--data.tokenizer", self.tokenizer),
            *("--data.sequence_length", "32", "--data.domain_key", "domain"),
            *("--validation.path", str(CORPUS / "validation.jsonl")),
            *("--training.global_batch_size", "8", "--training.micro_batch_size", "4"),
            *("--training.steps", "20", "--logging.tensorboard", "false"),
            *("--weighting.mode", "online", "--weighting.interval_steps", "3"),
            *("--weighting.warmup_steps", "5", "--weighting.group", "global"),
        ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text.jsonl"
    with zstandard.open(CORPUS / "train.jsonl.zst", "rt", encoding="utf-8") as lines:
        text.write_text("".join(line for line, _ in zip(lines, range(ROWS), strict=False)))
    model = folder / "tokenizer.model"
    _tool("train_tokenizer.py", "--input", text, "--vocab-size", "512", "--output", model)
    _tool(
        "preprocess_data.py",
        *("--input", text, "--output-prefix", folder / "corpus"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model),
        *("--append-eod", "--metadata-keys", "domain"),
    )
    return Corpus(str(folder / "corpus_text_document"), str(model))


def _tool(name: str, *arguments: object) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
