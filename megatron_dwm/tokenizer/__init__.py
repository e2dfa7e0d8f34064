"""Text to token ids and back: one Protocol, one builder, one trainer.

tokenizer = build_tokenizer("SentencePieceTokenizer", "corpus.model")
tokenizer.decode(tokenizer.encode("Hello"))
"""

from megatron_dwm.tokenizer.interface import TOKENIZER_KINDS, Piece, Tokenizer
from megatron_dwm.tokenizer.sentencepiece_model import build_tokenizer, train_sentencepiece

__all__ = ["TOKENIZER_KINDS", "Piece", "Tokenizer", "build_tokenizer", "train_sentencepiece"]
