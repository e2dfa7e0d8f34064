"""Many sequences at once decode to the texts of the tokenizer, also where they are cut short."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_dwm.tokenizer import (
    BatchDecoder,
    Tokenizer,
    build_tokenizer,
    open_tokenizer,
    train_sentencepiece,
)
from megatron_dwm.tokenizer.trial_texts import AWKWARD_TEXTS


def corpus_texts() -> list[str]:
    """Real text of the shipped corpus."""
    path = Path(__file__).parents[2] / "examples" / "corpus" / "validation.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def check(tokenizer: Tokenizer, *, is_fast: bool) -> None:
    """Compare whole texts with special tokens around them, and the first 1 to 39 ids of each."""
    around = tokenizer.around
    rows = [
        [*around.before, *tokenizer.encode(text), *around.after, tokenizer.eod_id]
        for text in [*AWKWARD_TEXTS, *corpus_texts()]
    ]
    cut = [row[:size] for row in rows for size in range(1, min(len(row), 40))]
    decoder = BatchDecoder(tokenizer)
    assert decoder.is_fast == is_fast
    for some in (rows, cut):
        ends = np.cumsum([len(row) for row in some])
        ids = np.array([i for row in some for i in row], np.uint16)
        found = decoder.decode(ids, ends)
        begins = [0, *(found.ends[:-1] + 1).tolist()]
        texts = [found.content[a:b].decode() for a, b in zip(begins, found.ends, strict=True)]
        assert texts == [tokenizer.decode(row) for row in some]
        assert all(found.content[end] == ord("\n") for end in found.ends)


def save(path: Path, tokenizer: tokenizers.Tokenizer, end: str) -> Tokenizer:
    """Write a tokenizer as `save_pretrained` does, and open it with its special tokens."""
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return build_tokenizer("HuggingFaceTokenizer", path, include_special_tokens=True)


def test_sentencepiece(tmp_path: Path) -> None:
    train_sentencepiece(corpus_texts(), vocab_size=700, output=tmp_path / "t.model")
    check(open_tokenizer(tmp_path / "t.model"), is_fast=True)


def test_unknown_pieces(tmp_path: Path) -> None:
    """A unigram model without bytes, whose unknown piece has a text of its own."""
    model = io.BytesIO()
    lines = [line for text in corpus_texts() for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=400,
        minloglevel=2,
    )
    (tmp_path / "u.model").write_bytes(model.getvalue())
    check(open_tokenizer(tmp_path / "u.model"), is_fast=True)


@pytest.mark.parametrize("begins", [False, True])
def test_byte_level(tmp_path: Path, begins: bool) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<end>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_texts(), trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    check(save(tmp_path, tokenizer, "<end>"), is_fast=True)


def test_llama_2s_tokenizer_json(tmp_path: Path) -> None:
    """Its decoder takes a space from the beginning of the text, which follows a special token."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1_000, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False
    )
    tokenizer.train_from_iterator([t[:300] for t in corpus_texts()], trainer)
    definition = json.loads(tokenizer.to_str())
    for token in definition["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["special"]]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    check(save(tmp_path, tokenizer, "</s>"), is_fast=True)


def test_another_decoder_is_left_to_the_library(tmp_path: Path) -> None:
    """WordPiece joins words by rules that no table of pieces has."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(corpus_texts(), trainer)
    check(save(tmp_path, tokenizer, "[SEP]"), is_fast=False)
