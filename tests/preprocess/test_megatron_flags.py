"""Job scripts written for Megatron-LM: its flags do something, are not needed, or are refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dwm.preprocess.megatron_flags import REFUSED

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def job(tmp_path: Path, model: Path) -> list[str | Path]:
    """A command that works."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "some text"}\n')
    return [
        *("preprocess_data.py", "--input", source, "--output-prefix", tmp_path / "out"),
        *("--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", model),
    ]


def test_flags_that_are_not_needed(job: list[str | Path], run: Run) -> None:
    flags = ["--partitions", "4", "--keep-sequential-samples", "--log-interval", "1000"]
    result = run(*job, *flags, "--workers", "1")
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 3 and all("is not needed" in line for line in lines)
    assert [line.split()[1] for line in lines] == [f for f in flags if f.startswith("--")]


def test_flags_that_are_refused(tmp_path: Path, job: list[str | Path], run: Run) -> None:
    before = set(tmp_path.iterdir())
    for name in ("--split-sentences", "--lang", "--vocab-file", "--tokenizer-special-tokens"):
        [flag] = [flag for flag in REFUSED if flag.name == name]
        result = run(*job, flag.name, *(["x"] if flag.nargs else []))
        assert result.returncode == 2, result.stderr
        [line] = result.stderr.splitlines()
        assert line == f"error: {name} is a flag of Megatron-LM's that is not here: {flag.words}"
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_one_json_array_is_said_to_be_one(
    tmp_path: Path, job: list[str | Path], run: Run, indent: int | None, mode: str
) -> None:
    source = tmp_path / "in.json"
    source.write_text(json.dumps([{"text": "a"}, {"text": "b"}] * 500, indent=indent))
    more = ["--input", source, "--on-bad-record", mode]
    for limit in ([], ["--max-record-bytes", "1000"]):
        result = run(*job, *more, *limit)
        assert result.returncode == 2, result.stderr
        [line] = result.stderr.splitlines()
        assert "in.json: one JSON array; expected an object on each line" in line
        assert "jq -c '.[]'" in line
        assert set(tmp_path.iterdir()) == {source, tmp_path / "in.jsonl"}


def test_sequences_train_a_tokenizer_too(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "in.jsonl"
    text = "the quick brown fox jumps over the lazy dog again and again "
    source.write_text(json.dumps({"text": [text, text * 9]}) + "\n")
    result = run(
        *("train_tokenizer.py", "--input", source, "--vocab-size", "300"),
        *("--output", tmp_path / "m.model"),
    )
    assert result.returncode == 0, result.stderr
