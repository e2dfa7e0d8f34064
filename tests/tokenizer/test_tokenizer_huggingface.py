"""tokenizer.json gives the ids of transformers, and the fast engine those of the references."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron_dwm.config.errors import UserError
from megatron_dwm.tokenizer import (
    Tokenizer,
    build_tokenizer,
    choose_engine,
    open_tokenizer,
    train_sentencepiece,
)
from megatron_dwm.tokenizer.trial_texts import AWKWARD_TEXTS

END = "<|endoftext|>"


def corpus_texts() -> list[str]:
    """Real text of the shipped corpus."""
    path = Path(__file__).parents[2] / "examples" / "corpus" / "validation.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def write(directory: Path, tokenizer: tokenizers.Tokenizer, **named: str) -> Path:
    """Write a directory as `save_pretrained` does."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, **named}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer, as GPT-2's, that asks for a beginning before each text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[END, "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return write(tmp_path_factory.mktemp("bytes"), tokenizer, eos_token=END)


def assert_engine_agrees(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoded = choose_engine(tokenizer).build().encode_texts(texts)
    begin = 0
    for text, end in zip(texts, encoded.ends, strict=True):
        assert encoded.ids[begin:end].tolist() == tokenizer.encode(text)
        begin = end
    assert begin == len(encoded.ids)


def test_ids_are_those_of_transformers(byte_level: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(byte_level, local_files_only=True)
    ours = open_tokenizer(byte_level)
    for text in [*AWKWARD_TEXTS, *corpus_texts(), f"a{END}b<s>"]:
        ids = ours.encode(text)
        assert ids == theirs.convert_tokens_to_ids(theirs.tokenize(text))
        assert not {0, 1} & set(ids)
        assert ours.decode(ids) == text
    assert (ours.vocab_size, ours.eod_id, ours.bos_id) == (len(theirs), 0, 1)
    assert ours.control_ids() == {END: 0, "<s>": 1}
    assert json.loads(ours.content)["model"]["type"] == "BPE"
    assert_engine_agrees(ours, [*AWKWARD_TEXTS, *corpus_texts(), f"a{END}b"])
    assert choose_engine(ours).name == "gigatoken"


def test_gigatoken_gives_sentencepieces_ids(tmp_path: Path) -> None:
    path = tmp_path / "bpe.model"
    train_sentencepiece(corpus_texts(), vocab_size=600, output=path)
    tokenizer = open_tokenizer(path)
    choice = choose_engine(tokenizer)
    assert (choice.name, choice.warning) == ("gigatoken", None)
    assert_engine_agrees(tokenizer, [*AWKWARD_TEXTS, *corpus_texts(), "a</s>b", "<s>", "<unk>"])


def test_fallback_is_loud_and_gives_the_reference(tmp_path: Path) -> None:
    lines = [line for text in corpus_texts() for line in text.splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=400,
        minloglevel=2,
    )
    path = tmp_path / "unigram.model"
    path.write_bytes(model.getvalue())
    unigram = open_tokenizer(path)
    choice = choose_engine(unigram)
    assert choice.name == "sentencepiece"
    assert choice.warning is not None and "gigatoken cannot be used" in choice.warning
    assert_engine_agrees(unigram, [*AWKWARD_TEXTS, *corpus_texts(), "a</s>b"])


def test_unigram_of_hugging_face_lets_a_document_end_itself(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus_texts(), trainer)
    unigram = open_tokenizer(write(tmp_path, tokenizer))
    assert 1 in unigram.encode("</s>"), "transformers does the same"
    with pytest.raises(UserError, match="becomes a control token"):
        choose_engine(unigram)


def test_tokenizer_that_lets_a_document_end_itself_is_refused(tmp_path: Path) -> None:
    words = {"<unk>": 0, "</s>": 1, "a": 2}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    with pytest.raises(UserError, match="becomes a control token"):
        choose_engine(open_tokenizer(write(tmp_path, tokenizer)))


def test_files_that_are_none(tmp_path: Path, byte_level: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"\0" * 50):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: not a Hugging Face tokenizer"):
            build_tokenizer("HuggingFaceTokenizer", tmp_path)
    with pytest.raises(UserError, match="not a SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", byte_level / "tokenizer.json")
    with pytest.raises(UserError, match="no such tokenizer"):
        open_tokenizer(tmp_path / "absent.json")


def test_end_of_document_has_to_be_known(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    with pytest.raises(UserError, match='put a tokenizer_config.json with "eos_token"'):
        open_tokenizer(write(tmp_path, tokenizer))
    with pytest.raises(UserError, match="'<end>' is no token"):
        open_tokenizer(write(tmp_path, tokenizer, eos_token="<end>"))
    assert open_tokenizer(write(tmp_path, tokenizer, eos_token="b")).eod_id == 1
