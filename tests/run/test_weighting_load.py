"""A weighting model that reads tokens goes with its tokenizer into another run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.forking.client import run_python
from tests.small_runs.command import pretrain, succeed
from tests.small_runs.fixtures import CORPUS, Corpus

OWN = ["--policy.name", "dwm", "--weighting.encoder", "own"]


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weighting/stage_1 of a run."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    succeed(run_dir, *corpus.arguments(), *OWN, "--training.steps", "6")
    return run_dir / "weighting" / "stage_1"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Other text, and a tokenizer that was trained on it; as many pieces as the first has."""
    folder = tmp_path_factory.mktemp("other")
    text, model = folder / "text.jsonl", folder / "tokenizer.model"
    shutil.copy(CORPUS / "heldout.jsonl", text)
    train = ["tools/train_tokenizer.py", "--input", text, "--vocab-size", "512", "--output", model]
    write = ["tools/preprocess_data.py", "--input", text, "--output-prefix", folder / "corpus"]
    write += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    write += ["--append-eod", "--metadata-keys", "domain"]
    for command in (train, write):
        done = run_python([str(part) for part in command])
        assert done.returncode == 0, done.stderr
    return Corpus(str(folder / "corpus_text_document"), str(model))


def _start(trained: Path, corpus: Corpus) -> list[str]:
    load = ["--weighting.load", str(trained), "--weighting.frozen", "true"]
    return [*corpus.arguments(), *OWN, *load, "--training.steps", "1"]


def test_the_file_names_the_tokenizer(corpus: Corpus, trained: Path) -> None:
    shape = json.loads((trained / "weighting.json").read_text())
    expected = hashlib.sha256(Path(corpus.tokenizer).read_bytes()).hexdigest()
    assert shape["tokenizer_sha256"] == expected


def test_another_tokenizer_of_the_same_size_is_refused(
    corpus: Corpus, other: Corpus, trained: Path, tmp_path: Path
) -> None:
    done = pretrain(tmp_path / "other", *_start(trained, other))
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "weighting.load" in line and str(trained) in line
    for tokenizer in (corpus.tokenizer, other.tokenizer):
        assert hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()[:12] in line
    done = pretrain(tmp_path / "same", *_start(trained, corpus))
    assert done.returncode == 0 and "weighting.load" not in done.stderr, done.stderr


def test_a_file_that_names_none_is_taken_with_a_warning(
    corpus: Corpus, trained: Path, tmp_path: Path
) -> None:
    """As earlier versions wrote it."""
    old = tmp_path / "stage_1"
    shutil.copytree(trained, old)
    shape = json.loads((old / "weighting.json").read_text())
    del shape["tokenizer_sha256"]
    (old / "weighting.json").write_text(json.dumps(shape))
    done = pretrain(tmp_path / "run", *_start(old, corpus))
    assert done.returncode == 0, done.stderr
    warnings = [s for s in done.stderr.splitlines() if s.startswith("warning: ")]
    [line] = [s for s in warnings if "no effect" not in s]
    assert str(old / "weighting.json") in line and "512" in line


def test_the_llms_features_need_no_tokenizer(corpus: Corpus, tmp_path: Path) -> None:
    llm = ["--policy.name", "dwm", "--weighting.encoder", "llm"]
    succeed(tmp_path / "run", *corpus.arguments(), *llm, "--training.steps", "1")
    trained = tmp_path / "run" / "weighting" / "stage_1"
    assert json.loads((trained / "weighting.json").read_text())["tokenizer_sha256"] is None
    load = ["--weighting.load", str(trained), "--weighting.frozen", "true"]
    done = pretrain(tmp_path / "b", *corpus.arguments(), *llm, *load, "--training.steps", "1")
    assert done.returncode == 0 and "tokenizer" not in done.stderr, done.stderr
