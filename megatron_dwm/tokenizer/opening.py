"""From a name on the command line or in a configuration to a tokenizer."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.config.errors import UserError
from megatron_dwm.tokenizer.huggingface import HuggingFaceModel
from megatron_dwm.tokenizer.interface import TOKENIZER_KINDS, Tokenizer
from megatron_dwm.tokenizer.sentencepiece_model import SentencePieceModel


def build_tokenizer(kind: str, model: str | Path) -> Tokenizer:
    """The tokenizer of type `kind` (`--tokenizer-type`) with the vocabulary in file `model`.

    Raises `UserError` for an unknown type, a missing file, or a file that is no tokenizer of this
    type with an end-of-sequence token.
    """
    if kind not in TOKENIZER_KINDS:
        known = ", ".join(TOKENIZER_KINDS)
        raise UserError(f"tokenizer type {kind!r} is not known; choose one of {known}")
    if kind == "HuggingFaceTokenizer":
        return HuggingFaceModel(Path(model))
    return SentencePieceModel(kind, Path(model))


def open_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer in `model`, of the type that its name tells.

    A directory or a `.json` file is Hugging Face's, anything else a SentencePiece model.
    Raises `UserError` as `build_tokenizer`.
    """
    path = Path(model)
    is_huggingface = path.is_dir() or path.suffix == ".json"
    return build_tokenizer(
        "HuggingFaceTokenizer" if is_huggingface else "SentencePieceTokenizer", path
    )
