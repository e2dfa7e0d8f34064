"""The exported tokenizer gives SentencePiece's ids, on everything."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import zstandard
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dwm.config import UserError
from megatron_dwm.convert.gate import AWKWARD_TEXTS, require_equal_ids
from megatron_dwm.convert.tokenizer_files import write_tokenizer_files
from megatron_dwm.tokenizer import Tokenizer, build_tokenizer, open_tokenizer
from tests.launch import REPOSITORY

SHARED = REPOSITORY.parent / "shared/data"
LETTERS = [*"abthe10 \n\t\u2581-=.,\u00e9\u4f60\U0001f600\u0301", "  ", "</s>", "<s>", "<0x41>"]


@pytest.fixture(params=["small", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "small":
        return request.getfixturevalue("small_tokenizer")
    model = SHARED / "tokenizer_32k.model"
    if not model.is_file():
        pytest.skip(f"{model} is missing")
    return build_tokenizer("SentencePieceTokenizer", model)


@pytest.fixture
def exported(tokenizer: Tokenizer, tmp_path: Path) -> PreTrainedTokenizerFast:
    write_tokenizer_files(tokenizer, 512, tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def _real_texts(texts: list[str]) -> list[str]:
    corpus = SHARED / "slimpajama_mini.jsonl.zst"
    if not corpus.is_file():
        return texts
    with corpus.open("rb") as raw:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), "utf-8")
        every = [json.loads(line)["text"] for line in lines]
    return texts + every[::25]


def test_ids_of_awkward_and_random_texts(
    tokenizer: Tokenizer, exported: PreTrainedTokenizerFast
) -> None:
    draw = random.Random(0)
    made = ["".join(draw.choices(LETTERS, k=draw.randint(1, 40))) for _ in range(3000)]
    pieces = [piece.text for piece in tokenizer.pieces()[259:]]
    joined = ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(3000)]
    for text in (*AWKWARD_TEXTS, *made, *joined):
        assert exported.encode(text) == tokenizer.encode(text), repr(text)


def test_ids_and_spelling_of_real_text(
    tokenizer: Tokenizer, exported: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    for text in _real_texts(texts):
        ids = exported.encode(text, verbose=False)
        assert ids == tokenizer.encode(text)
        assert exported.decode(ids) == tokenizer.decode(ids)


def test_text_cannot_end_a_document(exported: PreTrainedTokenizerFast) -> None:
    assert exported.eos_token_id == exported.bos_token_id == 2
    assert not {0, 1, 2} & set(exported("a</s><s> <unk>b").input_ids)
    # Who wants them parsed says so.
    assert exported("a</s>", split_special_tokens=False).input_ids[-1] == 2
    assert exported.decode([2, *exported.encode("a"), 2], skip_special_tokens=True) == "a"


def test_gate_refuses_a_tokenizer_it_cannot_express(texts: list[str], tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=600,
        model_type="unigram",
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "unigram.model").write_bytes(model.getvalue())
    tokenizer = build_tokenizer("SentencePieceTokenizer", tmp_path / "unigram.model")
    write_tokenizer_files(tokenizer, 512, tmp_path)
    with pytest.raises(UserError, match="expected a SentencePiece BPE model"):
        require_equal_ids(tokenizer, tmp_path)


def test_a_tokenizer_json_keeps_its_ids(texts: list[str], tmp_path: Path) -> None:
    """Uses byte-level BPE that adds a token before every text, as Llama 3's does."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "export").mkdir()
    write_tokenizer_files(tokenizer, 512, tmp_path / "export")
    require_equal_ids(tokenizer, tmp_path / "export")
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in (*texts[:20], "a<|end_of_text|>b"):
        ids = exported(text).input_ids
        assert ids == bpe.encode(text, add_special_tokens=False).ids or "<|" in text
        assert not {0, 1} & set(ids)
        assert exported.decode(ids) == text
    assert exported.eos_token_id == exported.bos_token_id == 1

    # Data of which every document begins with that token, as preprocess_data.py makes it.
    begun = open_tokenizer(tmp_path / "tokenizer.json", include_special_tokens=True)
    (tmp_path / "begun").mkdir()
    write_tokenizer_files(begun, 512, tmp_path / "begun")
    require_equal_ids(begun, tmp_path / "begun")
    exported = AutoTokenizer.from_pretrained(tmp_path / "begun")
    assert (exported.bos_token_id, exported.eos_token_id) == (0, 1)
    for text in ("", *texts[:20], "a<|end_of_text|>b<|begin_of_text|>c"):
        ids = exported(text).input_ids
        assert ids == [0, *begun.encode(text)] and not {0, 1} & set(ids[1:])
        assert exported.decode(ids, skip_special_tokens=True) == text
        assert exported(text, add_special_tokens=False).input_ids == ids[1:]
