"""Opens the tokenizer that a command line or a configuration names."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.config.errors import UserError
from megatron_dwm.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_dwm.tokenizer.interface import TOKENIZER_KINDS, Tokenizer
from megatron_dwm.tokenizer.sentencepiece_model import SentencePieceTokenizer
from megatron_dwm.tokenizer.tiktoken_file import TikTokenTokenizer, is_tiktoken

_ALIASES = {"GPTSentencePieceTokenizer": "SentencePieceTokenizer"}


def build_tokenizer(
    kind: str, model: str | Path, *, include_special_tokens: bool = False
) -> Tokenizer:
    """Build the tokenizer of type `kind` (`--tokenizer-type`) from the vocabulary in file `model`.

    include_special_tokens: put the special tokens around the text of a document that a
    tokenizer.json asks for; the other types ask for none.
    Raises `UserError` for an unknown type, a missing file, or a file that is not a tokenizer of
    this type with an end-of-sequence token.
    """
    kind = _ALIASES.get(kind, kind)
    if kind not in TOKENIZER_KINDS:
        known = ", ".join(TOKENIZER_KINDS)
        raise UserError(f"tokenizer type {kind!r} is not known; choose one of {known}")
    if kind == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(Path(model), include_special_tokens=include_special_tokens)
    if kind == "TikTokenizer":
        return TikTokenTokenizer(Path(model))
    return SentencePieceTokenizer(kind, Path(model))


def open_tokenizer(model: str | Path, *, include_special_tokens: bool = False) -> Tokenizer:
    """Open the tokenizer in `model`, whose name and first line determine its type.

    A directory, a `.json` file and one that begins like it are Hugging Face's; a file of base64
    tokens and ranks is Llama 3's own; anything else is a SentencePiece model.
    Raises `UserError` as `build_tokenizer` does.
    """
    return build_tokenizer(kind_of(model), model, include_special_tokens=include_special_tokens)


def kind_of(model: str | Path) -> str:
    """Returns the type of the tokenizer in `model`, as `build_tokenizer` takes it."""
    path = Path(model)
    if path.is_dir() or path.suffix == ".json" or _is_object(path):
        return "HuggingFaceTokenizer"
    return "TikTokenizer" if is_tiktoken(path) else "SentencePieceTokenizer"


def _is_object(path: Path) -> bool:
    """True for a tokenizer.json under another name, as older checkpoints have of a TikTokenizer."""
    try:
        with path.open("rb") as file:
            return file.read(1) == b"{"
    except OSError:
        return False
