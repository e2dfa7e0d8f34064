"""Texts, sources and scores of documents against the JSON Lines that they were made from."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.report.corpus import Corpus, tokens_in_batch
from megatron_dwm.report.document_scores import (
    read_scores,
    read_sources,
    score_columns,
    text_statistics,
)
from megatron_dwm.report.document_sums import sum_documents
from megatron_dwm.report.document_texts import DocumentTexts
from megatron_dwm.report.documents import clipped, describe, most_and_least
from megatron_dwm.report.runs import Run
from megatron_dwm.report.weight_rows import WeightRows
from tests.report.random_weights import random_rows, write_rows
from tests.small_runs.fixtures import Corpus as SmallCorpus
from tests.small_runs.fixtures import preprocessed

ROOT = Path(__file__).parents[2]
TEXTS = (
    "Plain words, twice: plain words.",
    "<script>alert('x')</script> & co",
    "naïve café — 漢字, emoji 🦊 and\ttab",
    "",
    "line one\nline two\n\n  indented",
    "ﬁne print",
)


@dataclass(frozen=True)
class Written:
    """Two data sets, and the text and the score of every document of both, in order."""

    settings: dict
    texts: list[str]
    scores: list[float | None]
    prefixes: tuple[str, str]


@pytest.fixture
def written(corpus: SmallCorpus, tmp_path: Path) -> Written:
    texts, scores, prefixes = [], [], []
    for name, repeats in (("first", 3), ("second", 2)):
        file = tmp_path / f"{name}.jsonl"
        of_file = [f"{text} {number}" for number in range(repeats) for text in TEXTS if text]
        of_file[1] = ""
        lines = [
            {"text": text, "domain": "d", "score": None if n % 4 == 3 else n / 2, "note": "x"}
            for n, text in enumerate(of_file)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        prefixes.append(_with_scores(preprocessed(file, corpus.tokenizer).prefix, lines))
        texts += of_file
        scores += [line["score"] for line in lines]
    data = {"train": [0.25, prefixes[0], 0.75, prefixes[1]], "tokenizer": corpus.tokenizer}
    settings = {"data": {**data, "domain_key": "domain"}}
    return Written(settings, texts, scores, (prefixes[0], prefixes[1]))


def _with_scores(prefix: str, lines: list[dict]) -> str:
    """Add columns, as score_data.py does."""
    path = Path(f"{prefix}.meta.parquet")
    table = pq.read_table(path)
    for name in ("score", "note"):
        table = table.append_column(name, pa.array([line[name] for line in lines]))
    pq.write_table(table, path, row_group_size=4)
    return prefix


def opened(config: dict) -> Corpus:
    return Corpus.open(_run(config))


def _run(config: dict) -> Run:
    return Run(name="run", path=Path("run"), metrics=[], config=config)


def expected_text(text: str, texts: DocumentTexts) -> str:
    """What the tokenizer makes of a text: it normalizes characters such as ligatures and tabs."""
    assert texts.tokenizer is not None
    return texts.tokenizer.decode(texts.tokenizer.encode(text))


def test_texts_are_those_of_the_source(written: Written) -> None:
    texts = DocumentTexts.open(opened(written.settings))
    assert not texts.notes and not texts.corpus.notes
    same = 0
    for number, text in enumerate(written.texts):
        found = texts.of(number, 1000)
        assert found == expected_text(text, texts)
        same += found == text
    assert same > len(written.texts) / 2, "most texts are not changed at all"
    assert texts.of(len(written.texts), 1000) is None
    assert texts.of(-1, 1000) is None


def test_only_the_beginning_is_read(written: Written) -> None:
    texts = DocumentTexts.open(opened(written.settings))
    for number, text in enumerate(written.texts):
        whole = expected_text(text, texts)
        for tokens in (0, 1, 5, 9):
            found = texts.of(number, tokens)
            assert found is not None and whole.startswith(found) and len(found) <= 5 * tokens + 5


def test_clipped_texts() -> None:
    assert clipped(None, 3) is None
    assert clipped("abc", 3) == "abc"
    assert clipped("ab cd", 3) == "ab …"


def test_the_text_of_each_token(written: Written) -> None:
    """Together they are the text, also where a character's bytes are several tokens."""
    texts = DocumentTexts.open(opened(written.settings))
    assert texts.tokenizer is not None
    for text in written.texts:
        ids = texts.tokenizer.encode(text)
        found = texts.tokens(ids)
        assert found is not None and len(found) == len(ids)
        assert "".join(found) == texts.tokenizer.decode(ids)


def test_sources_and_scores(written: Written) -> None:
    corpus = opened(written.settings)
    assert score_columns(corpus) == ["score"]
    every = np.arange(len(written.texts))
    for documents in (every, every[2::3], every[:0]):
        scores = read_scores(corpus, documents)
        expected = [written.scores[number] for number in documents]
        found = [None if v != v else v for v in scores.values_KC[:, 0].tolist()]
        assert found == expected
        sources, records = read_sources(corpus, documents)
        first = corpus.prefixes[0].num_documents
        assert records.to_pylist() == [n if n < first else n - first for n in documents.tolist()]
        names = [Path(source).name for source in sources.to_pylist()]
        assert names == ["first.jsonl" if n < first else "second.jsonl" for n in documents]
    assert np.isnan(read_scores(corpus, np.array([10**9])).values_KC).all()


def test_ids_of_64_bits_and_infinite_scores(written: Written) -> None:
    path = Path(f"{written.prefixes[0]}.meta.parquet")
    table = pq.read_table(path)
    wide, infinite = [2**60 + 1] * len(table), [1.0, math.inf, None] * len(table)
    table = table.append_column("id", pa.array(wide, pa.int64()))
    pq.write_table(table.append_column("inf", pa.array(infinite[: len(table)])), path)
    scores = read_scores(opened(written.settings), np.arange(3))
    found = dict(zip(scores.names, scores.values_KC.T.tolist(), strict=True))
    assert found["id"] == [float(2**60)] * 3
    assert found["inf"][0] == 1.0 and all(map(math.isnan, found["inf"][1:]))


def test_statistics_of_texts(written: Written) -> None:
    """Against the definitions in plain Python."""
    texts = DocumentTexts.open(opened(written.settings))
    every = np.arange(len(written.texts))
    scores = text_statistics(texts, every, max_documents=7)
    assert 3 < len(scores) <= 7
    for document, values in zip(scores.document_K.tolist(), scores.values_KC, strict=True):
        text = expected_text(written.texts[document], texts)
        found = dict(zip(scores.names, values.tolist(), strict=True))
        symbols = sum(not (c.isalnum() or c.isspace() or c == "_") for c in text)
        assert found["length"] == len(text)
        assert found["symbol_share"] == pytest.approx(symbols / max(1, len(text)))


def test_described_documents(written: Written, tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", random_rows())
    files, corpus = WeightRows.open(run), opened(written.settings)
    sums = sum_documents(files, None, None)
    texts, scores = DocumentTexts.open(corpus), read_scores(corpus, np.unique(sums.document_K))
    for stage in sums.stages:
        of_stage = sums.where(sums.stage_K == stage)
        chosen = most_and_least(of_stage, 5)
        found = describe(of_stage, chosen, files.domains, corpus, texts, scores, 12)
        assert [d.rank for d in found] == [1, 2, 3, 4, 5] * 2
        assert {d.stage for d in found} == {stage}
        for document in found:
            at = of_stage.document_K.tolist().index(document.document)
            assert document.weight == of_stage.weight_K[at]
            if document.document >= len(written.texts):
                assert document.text is document.source is document.record is None
                continue
            whole = expected_text(written.texts[document.document], texts)
            assert document.text == clipped(whole, 12)
            score = written.scores[document.document]
            assert document.scores == ({} if score is None else {"score": score})


def test_what_is_missing_is_said(written: Written, tmp_path: Path) -> None:
    first, second = written.prefixes
    assert opened({}).notes[0].startswith("no text of documents: data.train is empty")
    missing = {"data": {**written.settings["data"], "tokenizer": str(tmp_path / "gone.model")}}
    texts = DocumentTexts.open(opened(missing))
    assert texts.of(0, 10) is None and "gone.model" in texts.notes[0]
    unnamed = {"data": {**written.settings["data"], "tokenizer": None}}
    assert "names no tokenizer" in DocumentTexts.open(opened(unnamed)).notes[0]

    Path(f"{first}.bin").unlink()
    texts = DocumentTexts.open(corpus := opened(written.settings))
    assert "the data have moved" in corpus.notes[0] and f"{first}.bin" in corpus.notes[0]
    later = corpus.prefixes[1].first_document
    assert texts.of(0, 10) is None and texts.of(later, 10) is not None
    assert read_sources(corpus, np.arange(3))[1].to_pylist() == [0, 1, 2]

    Path(f"{first}.idx").unlink()
    Path(f"{first}.meta.parquet").unlink()
    notes = opened(written.settings).notes
    assert any("is missing: its documents have no source" in note for note in notes)
    assert notes[-1] == "documents of the prefixes after it cannot be numbered"
    alone = opened({"data": {**written.settings["data"], "train": [second]}})
    assert not alone.notes and len(alone.prefixes) == 1


def test_sidecars_that_do_not_fit(written: Written) -> None:
    first, second = written.prefixes
    shutil.copy(f"{second}.meta.parquet", f"{first}.meta.parquet")
    notes = opened(written.settings).notes
    assert any("rows for" in note and "is left out" in note for note in notes)
    Path(f"{first}.meta.parquet").write_bytes(b"PAR1?")
    assert any("cannot be read" in note for note in opened(written.settings).notes)
    Path(f"{second}.bin").write_bytes(b"")
    assert any("is shorter than" in note for note in opened(written.settings).notes)
    Path(f"{second}.idx").write_bytes(b"?")
    assert any("not a Megatron index" in note for note in opened(written.settings).notes)


def test_another_tokenizer_is_refused(written: Written, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    command = ["tools/train_tokenizer.py", "--vocab-size", "600", "--output", str(other)]
    command += ["--input", str(ROOT / "examples" / "corpus" / "heldout.jsonl")]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, capture_output=True)
    settings = {"data": {**written.settings["data"], "tokenizer": str(other)}}
    texts = DocumentTexts.open(opened(settings))
    assert texts.of(0, 10) is None and "is not the tokenizer of the data" in texts.notes[0]


def test_tokens_of_a_batch() -> None:
    sizes = {"training": {"global_batch_size": 8}, "data": {"sequence_length": 32}}
    assert tokens_in_batch(_run(sizes)) == 256 and tokens_in_batch(_run({})) is None
    equal = {"weighting": {"unit": "document", "unit_share": "equal"}}
    assert tokens_in_batch(_run({**sizes, **equal})) is None
