"""Users' mistakes at the command line: one line, exit code 2, nothing left behind."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

Run = Callable[..., subprocess.CompletedProcess[str]]
GOOD = b'{"text": "some text", "meta": {"set": "A"}}\n'


def preprocess(run: Run, source: Path, model: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command with outputs beside the input."""
    return run(
        "preprocess_data.py", "--input", source, "--output-prefix", source.parent / "out",
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model,
        "--workers", "1", *more,
    )  # fmt: skip


def assert_refused(
    result: subprocess.CompletedProcess[str], directory: Path, before: set[Path], *words: str
) -> None:
    """One line with `words`, exit code 2, the directory as it was."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert set(directory.iterdir()) == before


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"text": "cut\n', "broken JSON"),
        (b'{"title": "x"}\n', 'no key "text"'),
        (b'{"text": 5}\n', '"text" is a number'),
        (b'{"text": null}\n', '"text" is null'),
        (b'{"text": ["a", 5]}\n', '"text" is an array whose item 2 is a number'),
        (b'{"text": ["\\ud800"]}\n', "unpaired surrogate"),
        (b'["text"]\n', "expected a JSON object, found an array"),
        (b'{"text": "\xff"}\n', "invalid UTF-8 at byte 11"),
        (b'{"text": "\\ud800"}\n', "unpaired surrogate"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "cannot be read"),
    ],
)
def test_bad_record(tmp_path: Path, model: Path, run: Run, record: bytes, reason: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(record + GOOD)
    result = preprocess(run, source, model)
    assert_refused(result, tmp_path, {source}, "in.jsonl:1: ", reason, "--on-bad-record skip")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_record_after_output_has_begun(
    tmp_path: Path, model: Path, run: Run, workers: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD * 600 + b"nonsense\n" + GOOD)
    result = preprocess(run, source, model, "--workers", workers, "--metadata-keys", "meta.set")
    assert_refused(result, tmp_path, {source}, "in.jsonl:601: broken JSON")


def test_bad_records_skipped_and_listed(tmp_path: Path, model: Path, run: Run) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b"nonsense\n" + b'{"text": ""}\n' + b'{"text": "\xff"}\n' + GOOD)
    result = preprocess(run, source, model, "--on-bad-record", "skip")
    assert result.returncode == 0, result.stderr
    assert "5 records = 2 documents + 1 empty + 2 rejected" in result.stdout
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").open()]
    assert [(Path(row["file"]).name, row["line"]) for row in rejects] == [
        ("in.jsonl", 2),
        ("in.jsonl", 4),
    ]
    assert rejects[0]["first_bytes"] == "nonsense"
    assert rejects[1]["first_bytes"] == '{"text": "\\xff"}'
    assert "UTF-8" in rejects[1]["reason"]


def test_key_that_no_record_has(tmp_path: Path, model: Path, run: Run) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD * 3)
    before = {source}
    result = preprocess(run, source, model, "--json-keys", "body", "--on-bad-record", "skip")
    assert_refused(result, tmp_path, before, "all 3 records were rejected", 'no key "body"')
    result = preprocess(run, source, model, "--metadata-keys", "meta.score")
    assert result.returncode == 0
    [warning] = result.stderr.splitlines()
    assert "--metadata-keys meta.score: no record has this key" in warning


def test_a_file_is_read_once(tmp_path: Path, model: Path, run: Run) -> None:
    source, alias = tmp_path / "in.jsonl", tmp_path / "alias.jsonl"
    source.write_bytes(GOOD * 3)
    alias.symlink_to(source)
    before = {source, alias}
    for names in ([source, source], [source, alias], [tmp_path]):
        result = preprocess(run, names[0], model, "--input", *map(str, names))
        assert_refused(result, tmp_path, before, "in.jsonl", "the same input")


def test_false_endings_are_named(tmp_path: Path, model: Path, run: Run) -> None:
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_bytes(GOOD)
    assert_refused(preprocess(run, plain, model), tmp_path, {plain}, "not a .gz file")


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_corpus_without_text(tmp_path: Path, model: Path, run: Run, content: bytes) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    assert_refused(preprocess(run, source, model), tmp_path, {source}, "in.jsonl", "no document")


def test_damaged_compressed_files(tmp_path: Path, model: Path, run: Run) -> None:
    content = b"".join(b'{"text": "line %d"}\n' % i for i in range(5000))
    packed = {
        "cut.jsonl.zst": zstandard.ZstdCompressor().compress(content)[:-20],
        "cut.jsonl.gz": gzip.compress(content)[:-20],
        "other.jsonl.zst": content,
    }
    for name, damaged in packed.items():
        source = tmp_path / name
        source.write_bytes(damaged)
        result = preprocess(run, source, model)
        assert_refused(result, tmp_path, {source}, name, "damaged or truncated")
        source.unlink()


def test_names_that_do_not_work(tmp_path: Path, model: Path, run: Run) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD)
    other = tmp_path / "in.csv"
    other.write_bytes(GOOD)
    before = {source, other}
    for result, words in (
        (preprocess(run, tmp_path / "absent.jsonl", model), "absent.jsonl: no such input file"),
        (preprocess(run, other, model), "in.csv: its ending names no known format"),
        (preprocess(run, source, tmp_path / "absent.model"), "absent.model: no such tokenizer"),
        (preprocess(run, source, source), "not a SentencePiece model"),
        (preprocess(run, source, model, "--tokenizer-type", "Gpt2"), "'Gpt2' is not known"),
        (preprocess(run, source, model, "--workers", "0"), "--workers 0"),
        (preprocess(run, source, model, "--metadata-keys", "tokens"), "--metadata-keys tokens"),
    ):
        assert_refused(result, tmp_path, before, words)


@pytest.mark.parametrize("name", ["bin", "idx", "meta.parquet"])
def test_existing_output_is_kept(tmp_path: Path, model: Path, run: Run, name: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD)
    existing = tmp_path / f"out_text_document.{name}"
    existing.write_bytes(b"mine")
    assert_refused(preprocess(run, source, model), tmp_path, {source, existing}, "exists")
    assert existing.read_bytes() == b"mine"


def test_train_tokenizer(tmp_path: Path, corpus_dir: Path, run: Run) -> None:
    source, output = corpus_dir / "validation.jsonl", tmp_path / "new.model"

    def train(*more: str | Path) -> subprocess.CompletedProcess[str]:
        return run(
            "train_tokenizer.py",
            "--input",
            source,
            "--output",
            output,
            "--vocab-size",
            "500",
            *more,
        )

    for more, words in (
        (("--vocab-size", "1000000"), "take at most"),
        (("--vocab-size", "10"), "take at least"),
        (("--vocab-size", "-1"), "--vocab-size -1"),
        (("--json-key", "body"), 'validation.jsonl:1: no key "body"'),
        (("--input", tmp_path / "absent.jsonl"), "no such input file"),
    ):
        assert_refused(train(*more), tmp_path, set(), words)
    assert train().returncode == 0
    first = output.read_bytes()
    assert_refused(train(), tmp_path, {output}, "exists")
    assert output.read_bytes() == first
