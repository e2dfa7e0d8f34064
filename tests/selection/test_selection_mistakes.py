"""What a user may get wrong: one line, exit code 2, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dwm.files.lock import only_writer
from tests.selection.conftest import Dataset, Run, write_dataset

QUALITY = ("qurating", "--column", "score")


@pytest.fixture
def mistake(dataset: Dataset, run: Run, tmp_path: Path) -> Run:
    """Checks that a command fails with these words; options may replace those it has."""

    def check(words: str, method: str, *options: object) -> None:
        given = list(map(str, options))
        defaults = {"--input": dataset.prefix, "--output-prefix": tmp_path / "o", "--tokens": 500}
        more = [part for pair in defaults.items() if pair[0] not in given for part in pair]
        before = sorted(tmp_path.iterdir())
        done = run("select_data.py", method, *given, *more)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr
        assert done.stderr.startswith("error: ")
        assert sorted(tmp_path.iterdir()) == before

    return check


def test_input(mistake: Run, dataset: Dataset, tmp_path: Path) -> None:
    mistake("x.idx: no such file; --input takes prefixes", "random", "--input", tmp_path / "x")
    mistake("no column quality (--column); it has source_file, record, tokens, meta.redpajama",
            "qurating", "--column", "quality")  # fmt: skip
    mistake("source_file (--column) is of type string; a number", "qurating", "--column",
            "source_file")  # fmt: skip
    mistake("no column topic (--domain-key)", "random", "--domain-key", "topic")
    sidecar = Path(f"{dataset.prefix}.meta.parquet")
    content = sidecar.read_bytes()
    sidecar.write_bytes(content[:-7])
    mistake("d.meta.parquet: not a readable Parquet file", "random")
    sidecar.unlink()
    mistake("d.meta.parquet: no such file; --column reads a column", *QUALITY)
    mistake("no such file; --domain-shares reads", "random", "--domain-shares", "web=1")
    Path(f"{dataset.prefix}.bin").write_bytes(b"12")
    mistake("2 bytes, but its .idx points to", "random")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "column score is null in row 1 (from 0), one of 1 such documents with tokens"),
        (float("inf"), "column score is inf in row 1"),
    ],
)
def test_values(mistake: Run, tmp_path: Path, value: float | None, words: str) -> None:
    documents = [[[1, 2, 3]], [[4, 5]], [], [[6]]]
    columns = {"score": [1.5, value, None, 2.5], "same": [1, 1, 7, 1]}
    write_dataset(tmp_path / "v", documents, columns)
    mistake(words, *QUALITY, "--input", tmp_path / "v", "--tokens", 3)
    mistake("column same has the same value in all documents", "qurating", "--column", "same",
            "--input", tmp_path / "v", "--tokens", 3)  # fmt: skip


def test_values_too_large_to_square(mistake: Run, tmp_path: Path) -> None:
    write_dataset(tmp_path / "big", [[[1]], [[2]]], {"score": [1e300, -1e300]})
    mistake("too large for their deviation", *QUALITY, "--input", tmp_path / "big", "--tokens", 1)


def test_another_process_is_writing(mistake: Run, tmp_path: Path) -> None:
    with only_writer(tmp_path / "o.select.json"):
        mistake("o.select.json: another process is writing it; wait for it", "random")


def test_numbers(mistake: Run) -> None:
    mistake("--tokens 0: expected 1 or more", "random", "--tokens", 0)
    mistake("--tokens 10000000: the data has", "random", "--tokens", 10_000_000)
    mistake("--seed -1: expected 0 or more", "random", "--seed", -1)
    mistake("--temperature 0.0: expected more than 0", *QUALITY, "--temperature", 0)
    mistake("not allowed with argument", *QUALITY, "--temperature", 2, "--top-k")
    mistake("unrecognized arguments: --temperature", "random", "--temperature", 2)


def test_shares(mistake: Run) -> None:
    def shares(words: str, *entries: str) -> None:
        mistake(words, "random", "--domain-shares", *entries)

    shares("--domain-shares books: no document has this domain; column meta.redpajama_set_name "
           "has code, unknown, web", "books=1")  # fmt: skip
    shares("the shares add up to 0.9; expected 1", "web=0.5", "code=0.4")
    shares("web=x: expected DOMAIN=F", "web=x")
    shares("web=0: expected DOMAIN=F with F above 0", "web=0", "code=1")
    shares("web is named twice", "web=0.5", "web=0.5")
    shares("web gets less than a token of --tokens 500", "web=0.0005", "code=0.9995")
    mistake("web=1: that is 4000 tokens, but web has", "random", "--tokens", 4000,
            "--domain-shares", "web=1")  # fmt: skip


def test_outputs(mistake: Run, tmp_path: Path) -> None:
    mistake("no such output directory; make it first", "random", "--output-prefix",
            tmp_path / "a" / "o")  # fmt: skip
    for ending in (".bin", ".idx", ".meta.parquet"):
        path = tmp_path / f"o{ending}"
        path.write_bytes(b"mine")
        mistake(f"o{ending} exists; choose another output or remove it", "random")
        assert path.read_bytes() == b"mine"
        path.unlink()
    (tmp_path / "o.select.json").write_text("[]")
    mistake("o.select.json: not the record of a selection", "random")


def test_target_and_tokenizer(
    mistake: Run, corpus: str, corpus_dir: Path, model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target.jsonl"

    def dsir(words: str, **options: object) -> None:
        given = {"input": corpus, "target": target, "tokenizer": model, **options}
        pairs = [part for name, value in given.items() for part in (f"--{name}", value)]
        mistake(words, "dsir", *pairs)

    dsir("target.jsonl: no such input file")
    target.write_text('{"text": "fine"}\n{"text": \n')
    dsir("target.jsonl:2: ")
    target.write_text('{"text": "fine"}\n{"content": "no text"}\n')
    dsir("target.jsonl:2: ")
    for content in ("", '{"text": " \\n "}\n'):
        target.write_text(content)
        dsir(f"--target {target}: no text with a word in it")
    target.write_text('{"text": "fine"}\n')
    dsir("no such tokenizer model file", tokenizer=tmp_path / "x.model")
    other = corpus_dir.parents[2] / "shared" / "data" / "tokenizer_32k.model"
    if other.exists():
        dsir("says that the data was made with", tokenizer=other)
    Path(f"{tmp_path}/d.meta.parquet").unlink()
    dsir("has an id outside the vocabulary of", input=tmp_path / "d", workers=2)
    dsir("the data has 0 in documents of at least 10000000 words", **{"min-words": 10_000_000})
