"""Llama 3's own `tokenizer.model`: one token per line, its bytes in base64 and its rank.

Ids are the ranks. The 256 special tokens that Meta's code adds follow them: first the beginning of
text, then the end of text, which ends a document. The file is converted to the tokenizer.json with
the same ids, so the rest of the package needs no third kind of vocabulary, nor the `tiktoken`
library. As in Megatron-LM's TikTokenizer, no text gets a beginning. (That class reads another file:
a JSON list of tokens.)
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from megatron_dwm.config.errors import UserError
from megatron_dwm.tokenizer.files import read_tokenizer_file
from megatron_dwm.tokenizer.huggingface import HuggingFaceTokenizer

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""how Llama 3 splits a text before it merges tokens"""
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
_NUM_SPECIAL = 256


class TikTokenTokenizer(HuggingFaceTokenizer):
    """A tokenizer read from Llama 3's file (see `Tokenizer`)."""

    kind = "TikTokenizer"

    def __init__(self, path: Path) -> None:
        self.model_path = path
        file = read_tokenizer_file(path)
        content = json.dumps(_tokenizer_json(_read_ranks(file, path))).encode()
        self._load_vocabulary(content, file=file)
        self._name_ends({"eos_token": END, "bos_token": BEGIN})


def is_tiktoken(path: Path) -> bool:
    """True if the first line of `path` is a token in base64 and its rank."""
    try:
        with path.open("rb") as file:
            return _parse_line(file.readline(1024)) is not None
    except OSError:
        return False


def special_tokens() -> list[str]:
    """Returns the special tokens in the order of their ids (Meta's llama3/tokenizer.py)."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(_NUM_SPECIAL - 5)]
    headers = ["<|start_header_id|>", "<|end_header_id|>"]
    return [BEGIN, END, *reserved[:4], *headers, reserved[4], "<|eot_id|>", *reserved[5:]]


def _read_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        found = _parse_line(line)
        if found is None or found[1] != len(ranks) or found[0] in ranks:
            raise UserError(
                f"{path}:{number}: not Llama 3's tokenizer.model (expected the bytes of a new "
                f"token in base64, a space and the rank {len(ranks)})"
            )
        ranks[found[0]] = found[1]
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: not Llama 3's tokenizer.model (expected a token for each byte)")
    return ranks


def _parse_line(line: bytes) -> tuple[bytes, int] | None:
    parts = line.split()
    if len(parts) != 2 or not parts[1].isdigit():
        return None
    try:
        return base64.b64decode(parts[0], validate=True), int(parts[1])
    except binascii.Error:
        return None


def _tokenizer_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    spelling = spellings_of_bytes()

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _special(i, token) for i, token in enumerate(special_tokens(), len(ranks))
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, {**byte_level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token stays whole
            "vocab": {spell(token): rank for token, rank in ranks.items()},
            "merges": [(spell(left), spell(right)) for left, right in _merges(ranks)],
        },
    }


def _special(token_id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns every pair of tokens that together are a token, in the order of that token's rank."""
    merges = []
    for token, rank in ranks.items():
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = ((rank, ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks)
        merges += sorted(found)
    return [(left, right) for *_, left, right in merges]


def spellings_of_bytes() -> list[str]:
    """Returns the character for each byte in a byte-level vocabulary (GPT-2's)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    numbers = {byte: byte for byte in printable}
    numbers |= {byte: 256 + index for index, byte in enumerate(others)}
    return [chr(numbers[byte]) for byte in range(256)]
