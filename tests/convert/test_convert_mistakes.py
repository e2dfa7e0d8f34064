"""Mistakes end with one line, code 2, and nothing written or lost."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_dwm.config import UserError
from megatron_dwm.convert.checkpoint_reader import open_checkpoint
from megatron_dwm.convert.output import new_directory
from megatron_dwm.tokenizer import train_sentencepiece
from tests.convert.conftest import Saved, make_run
from tests.launch import REPOSITORY

TOOL = REPOSITORY / "tools/convert_checkpoint.py"


def _run_here(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[int, str]:
    """Returns (exit code, stderr) of the tool, without starting a new process."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    return stop.value.code, capsys.readouterr().err


def _spoil_config(directory: Path, **data: object) -> None:
    path = directory / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"].update(data)
    path.write_text(yaml.safe_dump(config))


def _cut_short(directory: Path) -> None:
    path = max((directory / "llm").glob("*.distcp"), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[:1000])


SPOILERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda d: (d / "llm/.metadata").unlink(), ".metadata"),
    "no tensors": (lambda d: next((d / "llm").glob("*.distcp")).unlink(), ".distcp"),
    "cut short": (_cut_short, "cut short"),
    "index cut short": (lambda d: (d / "llm/.metadata").write_bytes(b"\x80"), "damaged"),
    "no shape": (lambda d: (d / "shape.json").unlink(), "shape.json"),
    "shape cut short": (lambda d: (d / "shape.json").write_text('{"hidden'), "shape.json"),
    "no config": (lambda d: (d / "config.yaml").unlink(), "config.yaml"),
    "no llm": (lambda d: shutil.rmtree(d / "llm"), "llm"),
    "tokenizer moved": (lambda d: _spoil_config(d, tokenizer="gone.model"), "--tokenizer"),
    "tokenizer unnamed": (lambda d: _spoil_config(d, tokenizer=None), "--tokenizer"),
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_half_a_checkpoint(
    spoiler: str,
    checkpoints: dict[str, Saved],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    spoil, named = SPOILERS[spoiler]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["single-tied-grouped"].directory, checkpoint)
    spoil(checkpoint)
    arguments = ["to-hf", str(checkpoint), "--output", str(tmp_path / "hf")]
    code, stderr = _run_here(arguments, monkeypatch, capsys)
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert named in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, TOOL, "to-hf", tmp_path / "run", "--output", tmp_path / "hf"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / 'run'}: not a checkpoint")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "/proc/out"])
def test_place_where_nothing_can_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no file can"), new_directory(tmp_path / name):
        pytest.fail("began to write")
    assert not list(tmp_path.iterdir())


def test_existing_output_is_left_alone(
    checkpoints: dict[str, Saved],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "kept").write_text("mine")
    source = str(checkpoints["single-tied-grouped"].directory)
    arguments = ["to-hf", source, "--output", str(tmp_path / "kept")]
    code, stderr = _run_here(arguments, monkeypatch, capsys)
    assert (code, (tmp_path / "kept").read_text()) == (2, "mine")
    assert stderr == f"error: {tmp_path / 'kept'} exists; name another --output or remove it\n"


def test_tokenizer_of_another_run(
    checkpoints: dict[str, Saved],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    other = tmp_path / "other.model"
    train_sentencepiece(texts[:20], vocab_size=600, output=other)
    source = str(checkpoints["single-tied-grouped"].directory)
    arguments = ["to-hf", source, "--output", str(tmp_path / "hf"), "--tokenizer", str(other)]
    code, stderr = _run_here(arguments, monkeypatch, capsys)
    assert code == 2
    assert "is not the run's tokenizer" in stderr


def test_run_directory_means_its_newest_whole_checkpoint(
    checkpoints: dict[str, Saved], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = checkpoints["single-tied-grouped"].directory
    names = ["step_00000002", "step_00000010", "step_00000010_update_00000003"]
    first, second, third = make_run(source, tmp_path, names)
    shutil.copytree(source, tmp_path / "checkpoints" / "step_00000011.partial")
    assert open_checkpoint(tmp_path).directory == third
    (third / "manifest.json").unlink()
    data = max((second / "llm").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert open_checkpoint(tmp_path).directory == first
    warnings = capsys.readouterr().err.splitlines()
    assert "manifest.json is missing" in warnings[0] and f"{data.name} has another" in warnings[1]
    with pytest.raises(UserError, match=f"{data.name} has another checksum"):
        open_checkpoint(second)
    (first / "shape.json").write_text("{}")
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        open_checkpoint(tmp_path)
