"""Validation and held-out rows, decoded back to the text they came from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig, EvaluationConfig, ValidationConfig
from megatron_dwm.data.batch import NO_ROW
from megatron_dwm.data.validation import EvaluationSet, ValidationSet
from megatron_dwm.tokenizer import Tokenizer

DATA = DataConfig(sequence_length=64)


def write(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def validation(
    path: str | None, tokenizer: Tokenizer, loss_on: str = "all", data: DataConfig = DATA
) -> ValidationSet:
    return ValidationSet(ValidationConfig(path=path, loss_on=loss_on), data, tokenizer, seed=3)


def test_all_packs_every_token_as_a_label_once(shared: Path, tokenizer: Tokenizer) -> None:
    path = shared / "lambada_style.jsonl"
    stream: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        stream += [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eod_id]
    rows = validation(str(path), tokenizer)
    batch = rows.batch(0, rows.num_rows)
    order = torch.argsort(batch.sample_ids_B)
    mask = batch.loss_mask_BS[order].flatten() == 1
    assert rows.num_rows == -(-(len(stream) - 1) // 64)
    assert batch.labels_BS[order].flatten()[mask].tolist() == stream[1:]
    assert batch.tokens_BS[order].flatten()[mask].tolist() == stream[:-1]
    assert set(batch.domains) == {"unknown"} and batch.loss_mask_BS.dtype == torch.float32
    assert mask.sum() == len(stream) - 1  # padding of the last row carries none


@pytest.mark.parametrize("length", [16, 512])
def test_last_word_mask_decodes_to_the_last_word(
    shared: Path, tokenizer: Tokenizer, length: int
) -> None:
    path = shared / "lambada_style.jsonl"
    texts = [json.loads(x)["text"] for x in path.read_text(encoding="utf-8").splitlines()]
    rows = validation(str(path), tokenizer, "last_word", DataConfig(sequence_length=length))
    batch = rows.batch(0, rows.num_rows)
    assert rows.num_rows == len(texts) == 211
    for row in range(batch.size):
        mask = batch.loss_mask_BS[row] == 1
        text = texts[int(batch.document_ids_U[row])]
        assert tokenizer.decode(batch.labels_BS[row][mask].tolist()).strip() == text.split()[-1]
        before = text[: text.rindex(text.split()[-1])].rstrip()
        first = int(mask.nonzero().min())
        seen = tokenizer.decode(batch.tokens_BS[row][: first + 1].tolist())
        assert before.endswith(seen[-20:])


def test_batches_are_shuffled_passes_and_depend_on_their_number_alone(
    shared: Path, tokenizer: Tokenizer
) -> None:
    path = str(shared / "lambada_style.jsonl")
    rows, again = (validation(path, tokenizer, "last_word") for _ in range(2))
    late = again.batch(40, 10)
    ids = [i for k in range(43) for i in rows.batch(k, 10).sample_ids_B.tolist()]
    assert late.sample_ids_B.tolist() == ids[400:410]
    assert sorted(ids[:211]) == list(range(211)) and ids[:211] != ids[211:422]
    assert rows.batch(0, 500).size == 500  # a batch may be larger than the set


@pytest.mark.parametrize("size", [1, 4, 5, 7])
def test_no_row_comes_twice_in_a_batch(tmp_path: Path, tokenizer: Tokenizer, size: int) -> None:
    """Seven rows. Where a batch lies inside one pass it is that pass's rows, in its order."""
    lines = [{"text": f"passage number {i} ends here"} for i in range(7)]
    rows = validation(write(tmp_path / "v.jsonl", lines), tokenizer, "last_word")
    orders = [np.random.default_rng([3, n]).permutation(7).tolist() for n in range(60)]
    seen = Counter()
    for k in range(50):
        ids = rows.batch(k, size).sample_ids_B.tolist()
        assert len(set(ids)) == len(ids) == size, (k, ids)
        number, place = divmod(k * size, 7)
        inside = orders[number][place : place + size]
        assert ids[: len(inside)] == inside
        # Over the border: the next pass's rows in its order, but for those that are there.
        others = [row for row in orders[number + 1] if row not in inside]
        assert ids[len(inside) :] == others[: size - len(inside)]
        seen.update(ids)
    assert set(seen) == set(range(7))


def test_padding_has_neither_loss_nor_a_number(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [{"text": f"passage number {i} ends here"} for i in range(3)]
    rows = validation(write(tmp_path / "v.jsonl", lines), tokenizer, "last_word")
    batch = rows.batch(4, 3, num_padding=2)
    assert batch.sample_ids_B.tolist() == [*rows.batch(4, 3).sample_ids_B.tolist(), NO_ROW, NO_ROW]
    assert (batch.loss_mask_BS.sum(dim=1) > 0).tolist() == [True] * 3 + [False] * 2


def test_shared_passages_are_counted_by_their_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    target = [{"text": t} for t in ("one two  three", "four five six", "")]
    rows = validation(write(tmp_path / "v.jsonl", target), tokenizer)
    texts = ("one two three\n", "seven eight nine", "four five six", "four five six", " ", "four")
    held = [{"text": t, "meta": {"redpajama_set_name": "A"}} for t in texts]
    path = write(tmp_path / "e.jsonl", held)
    assert rows.num_shared(EvaluationSet(EvaluationConfig(path=path), DATA, tokenizer).texts) == 3


def test_domains_from_either_key(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [
        {"text": "one two three", "meta": {"redpajama_set_name": "RedPajamaBook"}},
        {"text": "four five six", "domain": "novel"},
        {"text": "seven eight nine"},
    ]
    batch = validation(write(tmp_path / "v.jsonl", lines), tokenizer, "last_word").batch(0, 3)
    found = dict(zip(batch.document_ids_U.tolist(), batch.domains, strict=True))
    assert found == {0: "RedPajamaBook", 1: "novel", 2: "unknown"}


def test_short_and_empty_passages(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [{"text": t} for t in ("", "   ", "a", "hello there", "Donaudampfschifffahrt", " x ")]
    path = write(tmp_path / "v.jsonl", lines)
    last = validation(path, tokenizer, "last_word")
    batch = last.batch(0, last.num_rows)
    assert last.num_rows == 3 and (batch.loss_mask_BS.sum(1) > 0).all()
    assert set(batch.document_ids_U.tolist()) == {3, 4, 5}
    assert validation(path, tokenizer).num_rows == 1
    with pytest.raises(UserError, match="no passage has a token"):
        validation(write(tmp_path / "a.jsonl", lines[:3]), tokenizer, "last_word")
    with pytest.raises(UserError, match="no passage has a token"):
        validation(write(tmp_path / "b.jsonl", lines[:1]), tokenizer)


def test_held_out_rows_have_one_domain_and_every_label_once(
    records: list[dict], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = [{**r, "text": r["text"][:700]} for r in records[:40]]
    path = write(tmp_path / "held.jsonl", lines)
    rows = EvaluationSet(EvaluationConfig(path=path), DATA, tokenizer)
    batches = list(rows.batches(7))
    assert {b.size for b in batches} == {7} and len(batches) == -(-rows.num_rows // 7)
    expected: dict[str, Counter] = {}
    for line in lines:
        ids = [*tokenizer.encode(line["text"]), tokenizer.eod_id]
        expected.setdefault(line["meta"]["redpajama_set_name"], Counter()).update(ids)
    found: dict[str, Counter] = {name: Counter() for name in expected}
    padding = 0
    for batch in batches:
        for row in range(batch.size):
            mask = batch.loss_mask_BS[row] == 1
            found[batch.domains[row]].update(batch.labels_BS[row][mask].tolist())
            padding += int(batch.sample_ids_B[row]) == NO_ROW
            assert mask.any() == (int(batch.sample_ids_B[row]) != NO_ROW)
    assert padding == len(batches) * 7 - rows.num_rows
    assert rows.domains == sorted(expected)
    for name, tokens in expected.items():  # all but the first token of the domain
        assert not found[name] - tokens and sum((tokens - found[name]).values()) == 1


BAD_FILES = [
    (b"", "is empty"),
    (b"\n  \n", "is empty"),
    (b'{"text": "fine words"}\n{"text": \n', "line 2 is not JSON"),
    (b'{"text": "fine words"}\n\xff\xfe\n', "line 2 is not JSON"),
    (b'{"text": "half \\ud800 pair"}\n', "line 1 is not JSON"),
    (b'{"text": "fine words"}\n\n{"txt": "x"}\n', "line 3 has no string `text`"),
    (b'{"text": 3}\n', "line 1 has no string `text`"),
    (b'["text"]\n', "line 1 has no string `text`"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_broken_files_name_file_and_line(
    tmp_path: Path, tokenizer: Tokenizer, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        validation(str(path), tokenizer)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_held_out_text_needs_a_domain_in_every_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [
        {"text": "words here", "meta": {"redpajama_set_name": "A"}},
        {"text": "more words", "meta": {"set": "A"}},
    ]
    config = EvaluationConfig(path=write(tmp_path / "held.jsonl", lines))
    with pytest.raises(UserError, match=r"held.jsonl line 2 has no meta.redpajama_set_name"):
        EvaluationSet(config, DATA, tokenizer)


def test_sets_with_names_are_domains(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The same rows as one file whose lines have these domains."""
    texts = ["one two three", "four five", "six seven eight", "nine"]
    plain = write(tmp_path / "plain.jsonl", [{"text": text} for text in texts[:2]])
    key = "meta.redpajama_set_name"
    mixed = [{"text": texts[2], "meta": {"redpajama_set_name": "x"}}, {"text": texts[3]}]
    sets = {"a": plain, "b": write(tmp_path / "mixed.jsonl", mixed)}
    names = ["a", "a", "b/x", "b"]
    whole = [
        {"text": text, "meta": {"redpajama_set_name": name}}
        for text, name in zip(texts, names, strict=True)
    ]
    assert DATA.domain_key == key
    one = EvaluationConfig(path=write(tmp_path / "one.jsonl", whole))
    found, expected = (
        EvaluationSet(config, DATA, tokenizer) for config in (EvaluationConfig(sets=sets), one)
    )
    assert found.domains == expected.domains == ["a", "b", "b/x"]
    [ours], [theirs] = found.batches(4), expected.batches(4)
    assert torch.equal(ours.tokens_BS, theirs.tokens_BS) and ours.domains == theirs.domains


def test_sets_may_not_share_a_domain(tmp_path: Path, tokenizer: Tokenizer) -> None:
    named = {"text": "one two", "meta": {"redpajama_set_name": "b"}}
    plain = write(tmp_path / "plain.jsonl", [{"text": "one two"}])
    path = write(tmp_path / "path.jsonl", [named])
    for config, words in (
        (EvaluationConfig(path=path, sets={"b": plain}), "sets b: evaluation.path has domain b"),
        (
            EvaluationConfig(sets={"a/b": plain, "a": path}),
            "sets a: evaluation.sets a/b has",
        ),
    ):
        with pytest.raises(UserError, match=words):
            EvaluationSet(config, DATA, tokenizer)


def test_missing_files_and_empty_keys(tmp_path: Path, tokenizer: Tokenizer) -> None:
    gone = str(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"validation.path: no file .*gone.jsonl"):
        validation(gone, tokenizer)
    with pytest.raises(UserError, match="validation.path is empty"):
        validation(None, tokenizer)
    with pytest.raises(UserError, match=r"evaluation.path: no file .*gone.jsonl"):
        EvaluationSet(EvaluationConfig(path=gone), DATA, tokenizer)
    with pytest.raises(UserError, match=r"evaluation.sets books: no file .*gone.jsonl"):
        EvaluationSet(EvaluationConfig(sets={"books": gone}), DATA, tokenizer)
