"""The text of a study in its folder, which may be the user's own.

text.jsonl, heldout.jsonl, target.NAME.jsonl, tokenizer.model
sample.json    fingerprints of those of these files that were written here
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from examples.study import texts
from examples.study.commands import run_tool
from examples.study.settings import file_fingerprint, vocabulary_fingerprint
from megatron_dwm.config import UserError
from megatron_dwm.files.atomic import write_json

_VOCABULARY = 1024
_TOKENIZER_OF = "text of tokenizer.model"


@dataclass(frozen=True, kw_only=True)
class StudyText:
    """The files of text in a study's folder."""

    folder: Path

    @property
    def training(self) -> Path:
        """The training text of all corpora."""
        return self.folder / "text.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of all runs."""
        return self.folder / "tokenizer.model"

    @property
    def held_out(self) -> Path:
        """The held-out text of all runs."""
        return self.folder / "heldout.jsonl"

    def target(self, name: str) -> Path:
        """Returns the passages of a target."""
        return self.folder / f"target.{name}.jsonl"

    @cached_property
    def domains(self) -> set[str]:
        """The domains of the training text."""
        return check_records(self.training, domain=True)

    @property
    def is_sample(self) -> bool:
        """True if all of it is the sample corpus'."""
        written = self._written()
        ours = all(written.get(file.name) == file_fingerprint(file) for file in self._writers())
        return ours and self._tokenizer_is_ours(written)

    def prepare(self) -> list[str]:
        """Write the text, the targets and the tokenizer, unless they are there.

        Returns the names of the files that are the user's own. Raises UserError for one of them
        with a mistake in it.
        """
        written, writers = self._written(), self._writers()
        for file, write in writers.items():
            if not file.is_file():
                write(file)
                written[file.name] = file_fingerprint(file)
        write_json(self._record, written)
        for file in writers:
            check_records(file, domain=file in (self.training, self.held_out))
        self._prepare_tokenizer(written)
        own = [file.name for file in writers if written.get(file.name) != file_fingerprint(file)]
        return own if self._tokenizer_is_ours(self._written()) else [*own, self.tokenizer.name]

    def fingerprints(self, target: str | None) -> list[str]:
        """Returns what tells this text from another. target: one that is read, too.

        A tokenizer that was trained here follows from the text, so it has none of its own: another
        machine may round differently when it trains it. Raises UserError for a missing file.
        """
        read = [self.training, self.held_out, *([self.target(target)] if target else [])]
        for file in read:
            if not file.is_file():
                raise UserError(f"{file}: no such file; a part of the study reads it")
        ours = self._tokenizer_is_ours(self._written())
        pieces = f"{_VOCABULARY} pieces" if ours else vocabulary_fingerprint(self.tokenizer)
        return [*map(file_fingerprint, read), pieces]

    def _writers(self) -> dict[Path, Callable[[Path], None]]:
        return {
            self.training: texts.write_training_text,
            self.held_out: texts.write_held_out,
            **{self.target(name): partial(texts.write_target, name) for name in texts.TARGETS},
        }

    def _prepare_tokenizer(self, written: dict[str, str]) -> None:
        """Train the tokenizer, unless it is the user's, or was trained from this text."""
        text = file_fingerprint(self.training)
        if self.tokenizer.is_file():
            check_tokenizer(self.tokenizer)
            trained_here = written.get(self.tokenizer.name) == vocabulary_fingerprint(
                self.tokenizer
            )
            if not trained_here or written.get(_TOKENIZER_OF) == text:
                return
            self.tokenizer.unlink()
            vocabulary_fingerprint.cache_clear()
        run_tool(
            "train_tokenizer", input=self.training, vocab_size=_VOCABULARY, output=self.tokenizer
        )
        pieces = vocabulary_fingerprint(self.tokenizer)
        write_json(self._record, {**written, self.tokenizer.name: pieces, _TOKENIZER_OF: text})

    def _tokenizer_is_ours(self, written: dict[str, str]) -> bool:
        return written.get(self.tokenizer.name) == vocabulary_fingerprint(
            self.tokenizer
        ) and written.get(_TOKENIZER_OF) == file_fingerprint(self.training)

    @property
    def _record(self) -> Path:
        return self.folder / "sample.json"

    def _written(self) -> dict[str, str]:
        if not self._record.is_file():
            return {}
        return json.loads(self._record.read_text(encoding="utf-8"))


def check_records(file: Path, *, domain: bool) -> set[str]:
    """Returns the domains of a JSON Lines file.

    Raises UserError with file and line for a record without `text`, or, if `domain` is set, without
    a `domain`; and for a file without records.
    """
    found: set[str] = set()
    for number, record in _records(file):
        expected = ["text", "domain"] if domain else ["text"]
        for key in expected:
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise UserError(f"{file} line {number}: expected a record with a text `{key}`")
        found.add(record.get("domain", ""))
    if not found:
        raise UserError(f"{file}: has no record")
    return found


def check_tokenizer(file: Path) -> None:
    """Raise UserError if a file is no SentencePiece model."""
    try:
        SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        raise UserError(f"{file}: is no SentencePiece model") from None


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text") from None
    except ValueError as error:
        raise UserError(f"{file} line {number}: is not JSON: {error}") from None
