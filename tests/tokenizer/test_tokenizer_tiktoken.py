"""Llama 3's own file gives the ids of plain byte-pair merging and of tiktoken."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import regex
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron_dwm.config.errors import UserError
from megatron_dwm.tokenizer import build_tokenizer, choose_engine, open_tokenizer
from megatron_dwm.tokenizer.tiktoken_file import PATTERN, special_tokens
from megatron_dwm.tokenizer.trial_texts import AWKWARD_TEXTS


def corpus_texts() -> list[str]:
    path = Path(__file__).parents[2] / "examples" / "corpus" / "validation.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def learn_ranks() -> dict[bytes, int]:
    """Returns the ranks of bytes and of the tokens merged from them, in the order of merging."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False)
    tokenizer.train_from_iterator(corpus_texts(), trainer)
    alphabet = {}
    for byte in range(256):  # how each byte is spelled: encode it as a character of Latin-1
        encoded = chr(byte).encode("utf-8")
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(byte))[0][0]
        alphabet |= dict(zip(spelled, encoded, strict=True))
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in json.loads(tokenizer.to_str())["model"]["merges"]:
        tokens.append(bytes(alphabet[character] for character in left + right))
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return learn_ranks()


@pytest.fixture(scope="module")
def model(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


def merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Merges the pair whose union has the lowest rank, the first of several, until none is left."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        unions = [a + b for a, b in zip(parts, parts[1:], strict=False)]
        known = [(ranks[union], place) for place, union in enumerate(unions) if union in ranks]
        if not known:
            return [ranks[part] for part in parts]
        place = min(known)[1]
        parts[place : place + 2] = [unions[place]]


def test_ids_are_those_of_merging_by_rank(model: Path, ranks: dict[bytes, int]) -> None:
    tokenizer = build_tokenizer("TikTokenizer", model)
    fast = choose_engine(tokenizer)
    texts = [*AWKWARD_TEXTS, *corpus_texts()[:40], "<|begin_of_text|>a<|eot_id|>"]
    engine = fast.build()
    for text in texts:
        words = [match.group().encode() for match in regex.finditer(PATTERN, text)]
        expected = [
            i for w in words for i in ([ranks[w]] if w in ranks else merged(w, ranks))
        ]  # fmt: skip
        assert tokenizer.encode(text) == expected, text[:40]
        assert engine.encode_texts([text]).ids.tolist() == expected, text[:40]
        assert tokenizer.decode(expected) == text


def test_ids_are_those_of_tiktoken(model: Path, ranks: dict[bytes, int]) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding(
        name="llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    ours = build_tokenizer("TikTokenizer", model)
    for text in [*AWKWARD_TEXTS, *corpus_texts()]:
        assert ours.encode(text) == theirs.encode(text)


def test_layout_is_llama_3s(model: Path, ranks: dict[bytes, int]) -> None:
    tokenizer = open_tokenizer(model)
    assert tokenizer.kind == "TikTokenizer"
    size = len(ranks)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eod_id) == (
        size + 256,
        size,
        size + 1,
    )
    # Of Llama 3: 128000 ranks; <|start_header_id|> is 128006, <|eot_id|> 128009, the last 128255.
    names = special_tokens()
    assert len(names) == len(set(names)) == 256
    assert (names[6], names[7], names[9]) == (
        *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    )
    assert (names[5], names[8], names[10], names[255]) == tuple(
        f"<|reserved_special_token_{i}|>" for i in (3, 4, 5, 250)
    )
    assert tokenizer.control_ids() == {name: size + i for i, name in enumerate(names)}


@pytest.mark.parametrize("change", ["rank", "base64", "twice", "bytes", "json", "empty"])
def test_files_that_are_none(tmp_path: Path, model: Path, change: str) -> None:
    lines = model.read_bytes().splitlines(keepends=True)
    content = {
        "rank": b"".join([*lines[:300], b"YWJjZGVm 999\n"]),
        "base64": b"".join([*lines[:300], b"!!! 300\n"]),
        "twice": b"".join([*lines[:300], lines[5].split()[0] + b" 300\n"]),
        "bytes": b"".join(lines[:200]),
        "json": b'[{"rank": 0, "token_bytes": "AA==", "token_str": "a"}]',
        "empty": b"",
    }[change]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not Llama 3's tokenizer.model"):
        build_tokenizer("TikTokenizer", path)


def test_alias_of_sentencepiece(tmp_path: Path) -> None:
    from megatron_dwm.tokenizer import train_sentencepiece

    train_sentencepiece(corpus_texts(), vocab_size=600, output=tmp_path / "m.model")
    kinds = ("GPTSentencePieceTokenizer", "SentencePieceTokenizer")
    built = [build_tokenizer(kind, tmp_path / "m.model") for kind in kinds]
    assert {tokenizer.kind for tokenizer in built} == {"SentencePieceTokenizer"}
