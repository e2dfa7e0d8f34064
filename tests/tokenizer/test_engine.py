"""The fast engine is used if its ids are the reference's, and the trial is remembered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from megatron_dwm.config.errors import UserError
from megatron_dwm.tokenizer import Tokenizer, choose_engine, open_tokenizer, remembered_engine

END = "<|endoftext|>"
TOKENS = ("Foo", "[tool]", "<think>", "ABC123")
AROUND = ("", " ", "  ", "a", "_", "1", "\u00e9", "Foo", "[tool]", "\n", ".", "\u4f60", " a", "a ")


def corpus_texts() -> list[str]:
    path = Path(__file__).parents[2] / "examples" / "corpus" / "validation.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def plain() -> str:
    """A byte-level BPE tokenizer, larger than the sample that the trial takes of a vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_texts(), trainer)
    return tokenizer.to_str()


def make_tokenizer(directory: Path, plain: str, **flags: bool) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(plain)
    tokenizer.add_tokens([AddedToken(token, normalized=False, **flags) for token in TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return open_tokenizer(directory)


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip", "special", None])
def test_added_tokens_get_the_references_ids(tmp_path: Path, plain: str, flag: str | None) -> None:
    tokenizer = make_tokenizer(tmp_path, plain, **({flag: True} if flag else {}))
    words = [token + more for token in TOKENS for more in ("", *TOKENS)]
    texts = [before + word + after for word in words for before in AROUND for after in AROUND]
    encoded = choose_engine(tokenizer).build().encode_texts(texts)
    rows = np.split(encoded.ids, encoded.ends[:-1])
    pairs = zip(texts, rows, strict=True)
    assert not [text for text, ids in pairs if ids.tolist() != tokenizer.encode(text)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the user's caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counted:
    """A tokenizer that counts the texts that it encodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.asked = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def encode(self, text: str) -> list[int]:
        self.asked += 1
        return self._tokenizer.encode(text)


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> tuple[int, str, list[int]]:
    """Returns the number of texts in the trial, the engine's name, and its ids."""
    counted = Counted(tokenizer)
    choice = remembered_engine(counted)
    asked = counted.asked
    return asked, choice.name, choice.build().encode_texts(texts).ids.tolist()


@pytest.mark.parametrize("flags", [{}, {"single_word": True}])
def test_a_trial_is_remembered(
    tmp_path: Path, plain: str, cache: Path, flags: dict[str, bool]
) -> None:
    tokenizer = make_tokenizer(tmp_path, plain, **flags)
    texts = corpus_texts()[:3]
    asked, name, ids = ids_of(tokenizer, texts)
    assert asked > 2000
    assert name == ("tokenizers" if flags else "gigatoken")
    assert ids_of(tokenizer, texts) == (0, name, ids)
    assert (remembered_engine(tokenizer).warning is None) == (not flags)
    [kept] = (cache / "megatron_dwm" / "engines").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", b"{}", whole[: len(whole) // 2], b"null\n", whole[:-1] + b"?"):
        kept.write_bytes(damaged)
        assert ids_of(tokenizer, texts) == (asked, name, ids), damaged[:20]
        assert list(kept.parent.iterdir()) == [kept] and kept.read_bytes() == whole
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "Foo"}))
    with pytest.raises(UserError, match="becomes a control token"):  # tried anew
        remembered_engine(open_tokenizer(tmp_path))


def test_a_cache_that_cannot_be_written_is_harmless(
    tmp_path: Path, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(tmp_path, plain)
    (tmp_path / "file").touch()
    expected = ["gigatoken", tokenizer.encode("text")]
    for place in ("/proc/absent", str(tmp_path / "file"), str(tmp_path / ("x" * 300))):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        asked, *rest = ids_of(tokenizer, ["text"])
        assert asked > 2000 and rest == expected
