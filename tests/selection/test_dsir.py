"""DSIR on the sample corpus, against a direct computation text by text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from sentencepiece import SentencePieceTrainer

from megatron_dwm.preprocess.read.texts import read_texts
from megatron_dwm.selection import workers
from megatron_dwm.selection.dsir import DsirScores
from megatron_dwm.selection.pool import open_pool
from megatron_dwm.tokenizer import open_tokenizer, train_sentencepiece
from tests.selection.conftest import Run, pq_table, quiet
from tests.selection.test_words import expected_words, published_bucket


def texts_of(prefix: str, model: Path) -> list[str]:
    """Every document as the tokenizer itself decodes it."""
    tokenizer = open_tokenizer(model)
    data = IndexedDataset(prefix)
    return [tokenizer.decode(data[i].tolist()) for i in range(len(data))]


def ngrams(text: str) -> list[str]:
    """Words, and pairs of neighbors."""
    words = expected_words(text)
    return words + [f"{a} {b}" for a, b in zip(words[:-1], words[1:], strict=True)]


def counts_of(texts: list[str], memory: dict[str, int]) -> list[Counter[int]]:
    """The buckets of each text, by the published hash."""
    counts = []
    for text in texts:
        found = ngrams(text)
        for ngram in found:
            if ngram not in memory:
                memory[ngram] = published_bucket(ngram)
        counts.append(Counter(memory[ngram] for ngram in found))
    return counts


def shares(counts: list[Counter[int]]) -> np.ndarray:
    """The part of each bucket in all n-grams."""
    total = np.zeros(10_000)
    for counter in counts:
        for bucket, count in counter.items():
            total[bucket] += count
    return total / total.sum()


@pytest.fixture(scope="module")
def expected(corpus: str, corpus_dir: Path, model: Path) -> tuple[np.ndarray, np.ndarray]:
    """The log-weight and the number of words of every document."""
    memory: dict[str, int] = {}
    texts = texts_of(corpus, model)
    raw = counts_of(texts, memory)
    target = counts_of(list(read_texts([str(corpus_dir / "validation.jsonl")], "text")), memory)
    ratios = np.log(shares(target) + 1e-8) - np.log(shares(raw) + 1e-8)
    weights = [sum(n * ratios[bucket] for bucket, n in counter.items()) for counter in raw]
    return np.array(weights), np.array([len(expected_words(text)) for text in texts])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_log_weights(
    corpus: str,
    corpus_dir: Path,
    model: Path,
    tmp_path: Path,
    expected: tuple[np.ndarray, np.ndarray],
    num_workers: int,
) -> None:
    method = DsirScores(
        target=str(corpus_dir / "validation.jsonl"), tokenizer=str(model), num_workers=num_workers
    )
    scores = method.scores(open_pool(corpus), quiet, tmp_path)
    weights_D, words_D = expected
    np.testing.assert_allclose(scores.values_D, weights_D, rtol=1e-9, atol=1e-7)
    assert np.array_equal(scores.eligible_D, words_D >= 100)
    assert not list(tmp_path.iterdir())


def test_fit_on_some_batches(
    corpus: str, corpus_dir: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third batch gives the shares; all documents get their weights from them."""
    spans = workers.spans_of(open_pool(corpus).tokens_D, 60_000)
    monkeypatch.setattr("megatron_dwm.selection.dsir.spans_of", lambda _: spans)
    total = int(open_pool(corpus).tokens_D.sum())
    target = str(corpus_dir / "validation.jsonl")
    method = DsirScores(target=target, tokenizer=str(model), fit_tokens=-(-total // 3))
    scores = method.scores(open_pool(corpus), quiet, tmp_path)
    memory: dict[str, int] = {}
    raw = counts_of(texts_of(corpus, model), memory)
    fitted = [counter for span in spans[::3] for counter in raw[span.begin : span.end]]
    assert len(spans) > 5
    ratios = np.log(shares(counts_of(list(read_texts([target], "text")), memory)) + 1e-8)
    ratios -= np.log(shares(fitted) + 1e-8)
    weights = [sum(n * ratios[bucket] for bucket, n in counter.items()) for counter in raw]
    np.testing.assert_allclose(scores.values_D, weights, rtol=1e-9, atol=1e-7)


def test_best_documents_are_written(
    corpus: str,
    corpus_dir: Path,
    model: Path,
    tmp_path: Path,
    run: Run,
    expected: tuple[np.ndarray, np.ndarray],
) -> None:
    done = run(
        *("select_data.py", "dsir", "--input", corpus, "--output-prefix", tmp_path / "o"),
        *("--tokens", 50_000, "--top-k", "--tokenizer", model, "--workers", 2),
        *("--target", corpus_dir / "validation.jsonl"),
    )
    assert done.returncode == 0, done.stderr
    weights_D, words_D = expected
    rows = pq_table(f"{corpus}.meta.parquet")
    tokens_D = rows.column("tokens").to_numpy()
    chosen: list[int] = []
    for document in np.argsort(-weights_D):
        if words_D[document] >= 100 and tokens_D[chosen].sum() < 50_000:
            chosen.append(int(document))
    assert pq_table(f"{tmp_path}/o.meta.parquet").equals(rows.take(sorted(chosen)))
    record = json.loads((tmp_path / "o.select.json").read_text())
    assert record["method"] == "dsir"
    assert len(record["options"]["target_sha256"]) == 1


def test_the_target_is_read_as_the_documents_are(
    run: Run, corpus_dir: Path, tmp_path: Path
) -> None:
    """A tokenizer that replaces typographic characters: the target's own documents fit it best."""
    texts = list(read_texts([str(corpus_dir / "validation.jsonl")], "text"))[:40]
    spelled = [text.replace("e", "\N{LATIN SMALL LIGATURE FF}") for text in texts]
    model, target, both = (tmp_path / name for name in ("m.model", "t.jsonl", "b.jsonl"))
    # Without a rule of its own SentencePiece normalizes by NFKC: a ligature becomes letters.
    SentencePieceTrainer.train(
        sentence_iterator=(t[:4000] for t in [*texts, *(t.replace("e", "ff") for t in texts)]),
        model_prefix=str(tmp_path / "m"), vocab_size=600, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    for path, content in ((target, spelled), (both, [*texts, *spelled])):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in content))
    done = run(
        *("preprocess_data.py", "--input", both, "--output-prefix", tmp_path / "b"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model, "--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    method = DsirScores(target=str(target), tokenizer=str(model), min_words=1)
    values_D = method.scores(open_pool(str(tmp_path / "b_text_document")), quiet, tmp_path).values_D
    assert values_D[len(texts) :].mean() > 0 > values_D[: len(texts)].mean()


def test_another_tokenizer_is_another_selection(
    model: Path, corpus_dir: Path, tmp_path: Path
) -> None:
    target = str(corpus_dir / "validation.jsonl")
    train_sentencepiece(read_texts([target], "text"), vocab_size=601, output=tmp_path / "o.model")
    options = [
        DsirScores(target=target, tokenizer=str(each)).options()
        for each in (model, tmp_path / "o.model")
    ]
    assert options[0] != options[1]
