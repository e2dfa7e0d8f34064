"""The fingerprint of what a run of a study was asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from examples.study.spec import Run

_CHARACTERS = 12


def fingerprint(
    run: Run, configuration: Path, texts: Sequence[Path], tokenizer: Path, needed: list[str]
) -> str:
    """Returns the same for runs that train the same, wherever their files are.

    configuration: the file that the options of the size and of the method are added to. texts: all
    that training and evaluation are made from. needed: the fingerprints of the runs before it.
    """
    method = run.method
    asked = [
        *(run.name, run.steps, run.size.options, method.options, method.select, run.learning_rate),
        configuration.read_text(encoding="utf-8"),
        *(_digest(text) for text in texts),
        _vocabulary(tokenizer),
        *needed,
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:_CHARACTERS]


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@cache
def _vocabulary(tokenizer: Path) -> str:
    """Returns a digest of the pieces; the file also has the path that it was trained from."""
    model = SentencePieceProcessor(model_file=str(tokenizer))
    pieces = "\n".join(map(model.id_to_piece, range(model.get_piece_size())))
    return hashlib.sha256(pieces.encode()).hexdigest()
