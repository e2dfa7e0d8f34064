"""Where tools put their outputs: missing directories and impossible places are one line."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dwm.files.lock import only_writer

Run = Callable[..., subprocess.CompletedProcess[str]]
Command = Callable[[str], list[str | Path]]

TOOLS = ("preprocess_data", "merge_datasets", "train_tokenizer", "add_junk")


@pytest.fixture(scope="module")
def commands(
    tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, model: Path, run: Run
) -> dict[str, Command]:
    """For every tool its arguments, given where the output goes."""
    source = tmp_path_factory.mktemp("source") / "in.jsonl"
    shutil.copy(corpus_dir / "validation.jsonl", source)

    def preprocess(prefix: str) -> list[str | Path]:
        return [
            *("preprocess_data.py", "--input", source, "--output-prefix", prefix),
            *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model),
        ]

    part = source.parent / "part"
    assert run(*preprocess(str(part))).returncode == 0
    dataset = f"{part}_text_document"
    return {
        "preprocess_data": preprocess,
        "merge_datasets": lambda to: [
            *("merge_datasets.py", "--input", dataset, "--output-prefix", to)
        ],
        "train_tokenizer": lambda to: [
            *("train_tokenizer.py", "--input", source, "--vocab-size", "500", "--output", to)
        ],
        "add_junk": lambda to: ["add_junk.py", "--input", source, "--output", f"{to}.jsonl"],
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_missing_directories_are_not_made(
    tmp_path: Path, commands: dict[str, Command], run: Run, tool: str
) -> None:
    result = run(*commands[tool](str(tmp_path / "a" / "b" / "out")))
    assert result.returncode == 2
    assert (
        result.stderr == f"error: {tmp_path / 'a' / 'b'}: no such output directory; make it first\n"
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_places_where_nothing_can_be_written(
    tmp_path: Path, commands: dict[str, Command], run: Run, tool: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    places = {
        str(tmp_path / ("x" * 300)): "File name too long",
        str(file / "out"): "Not a directory",
        "/proc/out": "no file can be written in this directory",  # read-only for root too
        "/proc/absent/out": "no such output directory",
    }
    for place, words in places.items():
        result = run(*commands[tool](place))
        assert result.returncode == 2, (place, result.stderr)
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert words in result.stderr
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "mine"


@pytest.mark.parametrize(
    ("tool", "last"),
    [("merge_datasets", "out.idx"), ("train_tokenizer", "out"), ("add_junk", "out.jsonl")],
)
def test_an_output_that_another_process_is_writing(
    tmp_path: Path, commands: dict[str, Command], run: Run, tool: str, last: str
) -> None:
    command = commands[tool](str(tmp_path / "out"))
    with only_writer(tmp_path / last):
        result = run(*command)
    words = f"error: {tmp_path / last}: another process is writing it; wait for it, or choose"
    assert result.returncode == 2 and result.stderr.startswith(words), result.stderr
    assert not list(tmp_path.iterdir())
    assert run(*command).returncode == 0
    assert not list(tmp_path.glob("*.lock")) and (tmp_path / last).is_file()


def test_complete_output_may_lie_where_nothing_can_be_written(
    tmp_path: Path, commands: dict[str, Command], run: Run
) -> None:
    command = commands["preprocess_data"](str(tmp_path / "out"))
    assert run(*command).returncode == 0
    tmp_path.chmod(0o555)
    result = run(*command, "--resume")
    tmp_path.chmod(0o755)
    assert result.returncode == 0 and "complete already" in result.stdout
