"""Text to token ids and back: the Tokenizer protocol, how to open one, a trainer, fast engines.

tokenizer = open_tokenizer("corpus.model")          # or a tokenizer.json, or its directory
tokenizer.decode(tokenizer.encode("Hello"))
engine = choose_engine(tokenizer).build()           # the same ids for many texts at once
BatchDecoder(tokenizer).decode(ids, ends)            # the same texts for many sequences at once
"""

from megatron_dwm.tokenizer.batch_decoder import BatchDecoder, DecodedTexts
from megatron_dwm.tokenizer.engine import Engine, EngineChoice, choose_engine, remembered_engine
from megatron_dwm.tokenizer.interface import (
    JSON_KINDS,
    TOKENIZER_KINDS,
    Piece,
    SpecialTokens,
    Tokenizer,
)
from megatron_dwm.tokenizer.opening import build_tokenizer, kind_of, open_tokenizer
from megatron_dwm.tokenizer.sentencepiece_model import train_sentencepiece

__all__ = [
    "JSON_KINDS",
    "TOKENIZER_KINDS",
    "BatchDecoder",
    "DecodedTexts",
    "Engine",
    "EngineChoice",
    "Piece",
    "SpecialTokens",
    "Tokenizer",
    "build_tokenizer",
    "choose_engine",
    "kind_of",
    "open_tokenizer",
    "remembered_engine",
    "train_sentencepiece",
]
