"""Ids are those of Megatron-Core's own tokenizer; training gives the layout of Llama 2."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from megatron_dwm.config.errors import UserError
from megatron_dwm.tokenizer import build_tokenizer, train_sentencepiece

SHARED = Path(__file__).parents[3] / "shared" / "data"
MODEL = SHARED / "tokenizer_32k.model"
AWKWARD = [
    "",
    " ",
    "  leading",
    "a  b",
    "trailing  ",
    "tab\tand\n\nlines\r\n",
    "</s> <s> <unk>",
    "naïve 你好 🦙",
    "a\0b",
    "0123456789",
]

needs_model = pytest.mark.skipif(not MODEL.exists(), reason="shared/data has no tokenizer here")


def corpus_texts() -> list[str]:
    """Real text of the shipped corpus."""
    path = Path(__file__).parents[2] / "examples" / "corpus" / "validation.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@needs_model
@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "Llama2Tokenizer"])
def test_ids_are_those_of_megatron_core(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tokenizers import MegatronTokenizer
    theirs = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(MODEL), metadata_path={"library": "sentencepiece"}
    )
    ours = build_tokenizer(kind, MODEL)
    for text in AWKWARD + corpus_texts():
        assert ours.encode(text) == theirs.tokenize(text)
    assert (ours.vocab_size, ours.eod_id) == (theirs.vocab_size, theirs.eod)


@needs_model
def test_identity_and_vocabulary() -> None:
    tokenizer = build_tokenizer("SentencePieceTokenizer", MODEL)
    assert tokenizer.kind == "SentencePieceTokenizer"
    assert tokenizer.model_path == MODEL
    assert tokenizer.sha256.startswith("dadfd56d") and tokenizer.sha256.endswith("5e134055")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id) == (32000, 2, 1)
    pieces = tokenizer.pieces()
    assert [piece.text for piece in pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert [piece.role for piece in pieces[:4]] == ["unknown", "control", "control", "byte"]


@needs_model
def test_text_cannot_spell_a_control_token() -> None:
    tokenizer = build_tokenizer("Llama2Tokenizer", MODEL)
    for spelling in ("</s>", "<s>", "<unk>", "a</s>b"):
        ids = tokenizer.encode(spelling)
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == spelling


@needs_model
def test_unpaired_surrogate_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        build_tokenizer("Llama2Tokenizer", MODEL).encode("a\ud800b")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b'{"text": "no model"}\n'])
def test_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.model: not a SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", path)


def test_missing_file_and_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.model: no such"):
        build_tokenizer("SentencePieceTokenizer", tmp_path / "absent.model")
    with pytest.raises(UserError, match="'Gpt2'.*SentencePieceTokenizer"):
        build_tokenizer("Gpt2", tmp_path / "absent.model")


def test_training_is_repeatable_and_has_llama_2_layout(tmp_path: Path) -> None:
    first, second = tmp_path / "first.model", tmp_path / "other.model"
    for path in (first, second):
        train_sentencepiece(corpus_texts(), vocab_size=600, output=path)
    assert first.read_bytes() == second.read_bytes()
    tokenizer = build_tokenizer("SentencePieceTokenizer", first)
    pieces = tokenizer.pieces()
    assert [piece.text for piece in pieces[:3]] == ["<unk>", "<s>", "</s>"]
    assert [piece.text for piece in pieces[3:259]] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert {piece.role for piece in pieces[3:259]} == {"byte"}
    assert all(piece.role == "normal" for piece in pieces[259:])
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id) == (600, 2, 1)


def test_trained_model_keeps_every_text(tmp_path: Path) -> None:
    path = tmp_path / "small.model"
    train_sentencepiece([*corpus_texts(), "1812 345 2023\n" * 99], vocab_size=600, output=path)
    tokenizer = build_tokenizer("SentencePieceTokenizer", path)
    for text in AWKWARD + corpus_texts()[:5]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert 0 not in ids, "byte fallback leaves nothing unknown"
    texts = [piece.text for piece in tokenizer.pieces()]
    # A space before the text, digits one by one, and a line break as one byte.
    pieces = [texts[i] for i in tokenizer.encode("to1812\n3")]
    assert pieces == ["\u2581to", "1", "8", "1", "2", "<0x0A>", "3"]


def test_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    output = tmp_path / "never.model"
    for vocab_size, advice in ((100, "at least"), (1_000_000, "at most")):
        with pytest.raises(UserError, match=f"{vocab_size}.*{advice}"):
            train_sentencepiece(corpus_texts(), vocab_size=vocab_size, output=output)
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece(["", "\n"], vocab_size=600, output=output)
    assert list(tmp_path.iterdir()) == []


def test_mistake_in_the_texts_keeps_its_own_words(tmp_path: Path) -> None:
    def texts() -> list[str]:
        yield "some text"
        raise UserError("corpus.jsonl:2: broken")

    with pytest.raises(UserError, match=r"^corpus\.jsonl:2: broken$"):
        train_sentencepiece(texts(), vocab_size=600, output=tmp_path / "never.model")


def test_existing_model_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "mine.model"
    output.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists"):
        train_sentencepiece(corpus_texts(), vocab_size=600, output=output)
    assert output.read_bytes() == b"mine"
