"""What the rest of the package knows about a tokenizer."""

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
"""those whose `content` is a tokenizer.json"""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One row of the vocabulary; its id is its position."""

    text: str
    """the piece as the model file spells it (U+2581 for a space, <0x0A> for a byte)"""
    score: float
    """BPE merges the pair with the highest score first; 0 for control and byte pieces"""
    role: Literal["normal", "unknown", "control", "byte", "unused"]
    """what the model uses the piece for"""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids that a tokenizer.json puts around a text (Llama 3's: the beginning of text)."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class Tokenizer(Protocol):
    """A vocabulary with an encoder and a decoder: the reference that fast engines are held to."""

    @property
    def kind(self) -> str:
        """The `--tokenizer-type` it was built with."""

    @property
    def model_path(self) -> Path:
        """File it was read from."""

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of that file: two tokenizers are the same if it is."""

    @property
    def content(self) -> bytes:
        """For `JSON_KINDS` a `tokenizer.json`, which an export copies as it is; for the others a
        SentencePiece model, which an export writes from `pieces`."""

    @property
    def vocab_size(self) -> int:
        """Pieces in the vocabulary; every id is below it. Not padded."""

    @property
    def eod_id(self) -> int:
        """Id that ends a document (Megatron-LM takes the model's end of sequence)."""

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning of a sequence, which `encode` never adds; None if there is none."""

    @property
    def around(self) -> SpecialTokens:
        """What a document has around its text, besides its end; `encode` adds none of it."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without beginning or end.

        The spelling of a control token in the text ("</s>") is text like any other, so no
        document can end itself. Raises `ValueError` for text with an unpaired surrogate, which
        no UTF-8 file can hold.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens have none."""

    def pieces(self) -> list[Piece]:
        """The whole vocabulary in the order of the ids (for export to other formats).

        A `tokenizer.json` does not score its pieces: there `score` is 0.
        """

    def control_ids(self) -> dict[str, int]:
        """Spelling and id of every control token, which no text may ever become."""
