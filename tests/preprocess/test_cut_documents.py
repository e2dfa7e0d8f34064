"""examples/cut_documents.py: parts that add up to the corpus, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from tests.forking.client import run_python
from tests.small_runs.fixtures import Corpus

LINES = [{"text": "one two  three four " * 20, "domain": "a"}, {"text": "five", "domain": "b"}]


def cut(corpus: Corpus, source: Path, output: Path, *options: str) -> tuple[int, str]:
    """Exit code and standard error of the command."""
    files = ["--input", str(source), "--output", str(output), "--tokenizer", corpus.tokenizer]
    done = run_python(["examples/cut_documents.py", *files, *options])
    return done.returncode, done.stderr


def test_parts_add_up_to_a_compressed_corpus(tmp_path: Path, corpus: Corpus) -> None:
    source, output = tmp_path / "in.jsonl.zst", tmp_path / "out.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    source.write_bytes(zstandard.compress(text.encode()))
    assert cut(corpus, source, output, "--least", "5", "--most", "9") == (0, "")
    parts = [json.loads(line) for line in output.read_text().splitlines()]
    for line in LINES:
        of_line = [part["text"] for part in parts if part["domain"] == line["domain"]]
        assert "".join(of_line) == line["text"].rstrip()
    assert len(parts) > 4


@pytest.mark.parametrize(
    ("content", "said"),
    [("[1]", "an array"), ("{broken", "broken JSON"), ('{"a": 1}', 'no key "text"')],
)
def test_a_bad_record_is_one_line_and_leaves_no_output(
    tmp_path: Path, corpus: Corpus, content: str, said: str
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(LINES[0]) + f"\n{content}\n")
    code, error = cut(corpus, source, output)
    assert code == 2 and error.startswith(f"error: {source}:2: ") and said in error
    assert list(tmp_path.iterdir()) == [source]


def test_files_that_cannot_be_used(tmp_path: Path, corpus: Corpus) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    code, error = cut(corpus, source, output)
    assert code == 2 and error == f"error: {source}: no such input file\n"
    source.write_text(json.dumps(LINES[0]) + "\n")
    output.write_text("mine")
    code, error = cut(corpus, source, output)
    assert code == 2 and error.count("\n") == 1 and "exists" in error
    assert output.read_text() == "mine"
