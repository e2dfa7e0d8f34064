"""The interface of tokenizers to the rest of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

TokenizerKind = Literal[
    "SentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer", "TikTokenizer"
]

TOKENIZER_KINDS: tuple[str, ...] = get_args(TokenizerKind)
"""Values of `--tokenizer-type`, spelled as Megatron-LM spells them."""

JSON_KINDS = ("HuggingFaceTokenizer", "TikTokenizer")
"""the kinds whose `content` is a tokenizer.json"""


PieceRole = Literal["normal", "unknown", "control", "byte", "unused"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One row of the vocabulary; its id is its position."""

    text: str
    """the piece as the model file spells it (U+2581 for a space, <0x0A> for a byte)"""
    score: float
    """BPE merges the pair with the highest score first; 0 for control and byte pieces"""
    role: PieceRole
    """the model's use of the piece"""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids that a tokenizer.json puts around a text (Llama 3's: the beginning of text)."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class Tokenizer(Protocol):
    """A vocabulary with an encoder and a decoder: the reference for the ids of fast engines."""

    @property
    def kind(self) -> str:
        """The `--tokenizer-type` it was built with."""
        ...

    @property
    def model_path(self) -> Path:
        """File it was read from."""
        ...

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of that file: tokenizers with the same digest are the same."""
        ...

    @property
    def content(self) -> bytes:
        """For `JSON_KINDS` a `tokenizer.json`, which an export copies; for the others a
        SentencePiece model, which an export writes from `pieces`.
        """
        ...

    @property
    def file(self) -> bytes:
        """The bytes of the file that it was read from, of which `sha256` is the digest."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of pieces in the vocabulary, without padding; every id is below it."""
        ...

    @property
    def eod_id(self) -> int:
        """Id that ends a document (Megatron-LM takes the model's end of sequence)."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning of a sequence, which `encode` never adds; None if there is none."""
        ...

    @property
    def around(self) -> SpecialTokens:
        """Special tokens around a document's text, without its end; `encode` adds none of them."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without beginning or end.

        The spelling of a control token in the text ("</s>") is text like any other, so no
        document can end itself. Raises `ValueError` for text with an unpaired surrogate, which
        UTF-8 cannot encode.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; control tokens have none."""
        ...

    def pieces(self) -> list[Piece]:
        """Returns the whole vocabulary in the order of the ids (for export to other formats).

        A `tokenizer.json` has no scores; their `score` is 0.
        """
        ...

    def control_ids(self) -> dict[str, int]:
        """Returns spelling and id of every control token, which the ids of a text never contain."""
        ...
