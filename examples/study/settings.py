"""Fingerprints of what a run of a study was asked for, and of what its data are made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml
from sentencepiece import SentencePieceProcessor

from examples.study.spec import Run

_CHARACTERS = 12


def run_fingerprint(run: Run, words: Sequence[str], base: Path, made_from: Sequence[str]) -> str:
    """Returns the same for runs that train the same, wherever their files are.

    words: the run's options, without files. base: the configuration that they are added to.
    made_from: fingerprints of all text that the run reads, and of the runs before it.
    """
    return _digest([run.name, run.method.select, list(words), _keys(base), *made_from])


def data_fingerprint(*made_from: object) -> str:
    """Returns the same for data that are made from the same."""
    return _digest(made_from)


@cache
def file_fingerprint(file: Path) -> str:
    """Returns a digest of a file's bytes; it is read once."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


@cache
def vocabulary_fingerprint(tokenizer: Path) -> str:
    """Returns a digest of a SentencePiece model's pieces.

    Its file also has the path of the text that it was trained from.
    """
    model = SentencePieceProcessor(model_file=str(tokenizer))
    return _digest([model.id_to_piece(i) for i in range(model.get_piece_size())])


@cache
def _keys(file: Path) -> object:
    """Returns what a YAML file holds; a page asks for every run, many times."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:_CHARACTERS]
