"""Writes a training tokenizer as the files of a Hugging Face tokenizer that gives the same ids.

A tokenizer.json is kept, except for the step that adds special tokens around a text. It adds those
that training had before the text of every document (Llama 3's beginning of text), and nothing where
training had none. A SentencePiece BPE model is converted here, because transformers' own conversion
changes ids (leading and double spaces).

* Merges. SentencePiece joins the neighbors whose union has the best score; Hugging Face goes
  through a list of pairs. The list has every pair of pieces whose union is a piece, best score
  first.
* Spaces. A space is added before the text and every space becomes U+2581; there is no other
  normalization and no pre-tokenizer.
* Control tokens. Training reads the spelling of a control token ("</s>") as plain text, so that no
  document can end itself. `split_special_tokens` makes transformers do the same. To parse control
  tokens, pass `split_special_tokens=False` when calling the tokenizer.
* Beginning of sequence. Training ends every document with the end-of-document token. If it writes
  no beginning of sequence, the LLM sees the start of a text after an end of document. The same
  token is therefore also the beginning of sequence (as in GPT-2), for evaluation or generation that
  needs something before the first token, and encoding adds neither.
* Padding. It is the tokenizer's own padding token, if the vocabulary has one; else the unknown
  token, which no text gives where bytes are pieces; else the end-of-document token. (That one comes
  last: a trainer that masks padding would never learn to end a text.)

Supports SentencePiece BPE models with the layout of Llama 2 (with or without byte pieces). For any
other model the gate (gate.py) finds ids that differ. Cost: some seconds for 32,000 pieces.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dwm.files.sidecar_format import TOKENIZER_SHA256
from megatron_dwm.tokenizer import JSON_KINDS, Piece, Tokenizer

_SPACE = "\u2581"
_MERGED_ROLES = ("normal",)
_CONTROL_ROLES = ("control", "unknown")
_USUAL_PADDINGS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")


def write_tokenizer_files(tokenizer: Tokenizer, sequence_length: int, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `directory`."""
    pieces = tokenizer.pieces()
    for name, content in {
        "tokenizer.json": (
            _as_trained(tokenizer, pieces)
            if tokenizer.kind in JSON_KINDS
            else tokenizer_json(pieces)
        ),
        "tokenizer_config.json": {
            **tokenizer_config(pieces, tokenizer.eod_id, sequence_length, tokenizer.around.before),
            # tokenizer.json may be written anew, so its own digest is not that of training's file.
            TOKENIZER_SHA256: tokenizer.sha256,
        },
    }.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (directory / name).write_text(text + "\n", encoding="utf-8")


def _as_trained(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Returns a tokenizer.json that begins a text as training did, and does nothing else to it."""
    content = json.loads(tokenizer.content)
    before = [(pieces[token].text, token) for token in tokenizer.around.before]
    begins = _template(before) if before else None
    return {**content, "post_processor": begins, "truncation": None, "padding": None}


def _template(before: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Returns a post-processor that puts these tokens before a text, or before each of two."""

    def begun(part: str, type_id: int) -> list[dict[str, Any]]:
        tokens = [{"SpecialToken": {"id": text, "type_id": type_id}} for text, _ in before]
        return [*tokens, {"Sequence": {"id": part, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": begun("A", 0),
        "pair": [*begun("A", 0), *begun("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [token], "tokens": [text]} for text, token in before
        },
    }


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Returns every pair of pieces whose union is a piece, in SentencePiece's order."""
    ids = {piece.text: i for i, piece in enumerate(pieces) if piece.role in _MERGED_ROLES}
    found = [
        (-pieces[i].score, i, ids[text[:cut]], text[:cut], text[cut:])
        for text, i in ids.items()
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def tokenizer_json(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Returns the content of tokenizer.json."""
    unknown = next((piece.text for piece in pieces if piece.role == "unknown"), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, piece.text)
            for i, piece in enumerate(pieces)
            if piece.role in _CONTROL_ROLES
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.role == "byte" for piece in pieces),
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges(pieces)],
        },
    }


def tokenizer_config(
    pieces: Sequence[Piece], eod_id: int, sequence_length: int, before: Sequence[int] = ()
) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json.

    before: ids that tokenizer.json puts before a text.
    """
    end = pieces[eod_id].text
    # With these keys transformers replaces the post-processor of tokenizer.json.
    adds = {} if before else {"add_bos_token": False, "add_eos_token": False}
    unknown = next((piece.text for piece in pieces if piece.role == "unknown"), None)
    return {
        # LlamaTokenizer would rebuild the normalizer and change ids.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        **adds,
        "bos_token": pieces[before[0]].text if before else end,
        "eos_token": end,
        "unk_token": unknown,
        "pad_token": pieces[padding_id(pieces, eod_id)].text,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
        # transformers 4 adds token_type_ids, which Llama's generate refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }


def padding_id(pieces: Sequence[Piece], eod_id: int) -> int:
    """Returns the id that pads short rows of a batch."""
    roles = {piece.text: number for number, piece in enumerate(pieces) if piece.role == "control"}
    named = next((roles[text] for text in _USUAL_PADDINGS if text in roles), None)
    unknown = next((i for i, piece in enumerate(pieces) if piece.role == "unknown"), None)
    return next(found for found in (named, unknown, eod_id) if found is not None)


def _added_token(token_id: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, **flags, "special": True}
