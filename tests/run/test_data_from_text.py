"""Runs whose data.train is text: preprocessed once, as the tool does it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from megatron_dwm.config import UserError
from megatron_dwm.preprocess import for_run
from tests.small_runs.command import RESUME, metrics, pretrain, succeed, without_time
from tests.small_runs.fixtures import CORPUS, Corpus

STEPS = ["--training.steps", "4"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A copy of the corpus, whose time of change is new."""
    return Path(shutil.copy(CORPUS / "train.jsonl.zst", tmp_path / "mine.jsonl.zst"))


def _arguments(corpus: Corpus, text: Path) -> list[str]:
    return [*corpus.arguments(), "--data.train", str(text), *STEPS]


def test_text_trains_as_its_indexed_files(corpus: Corpus, text: Path, tmp_path: Path) -> None:
    run_dir, arguments = tmp_path / "runs" / "text", _arguments(corpus, text)
    done = pretrain(run_dir, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"data.train {text}: tokens are written to" in done.stdout
    [index] = (tmp_path / "runs" / "prepared_data").glob("mine-*_text_document.idx")
    prefix = str(index.with_suffix(""))
    tool = [*corpus.arguments(), "--data.train", prefix, *STEPS]
    succeed(tmp_path / "runs" / "indexed", *tool)
    assert without_time(run_dir) == without_time(tmp_path / "runs" / "indexed")
    # A second run, and a resumed one, find them there.
    written = index.stat().st_mtime_ns
    again = pretrain(tmp_path / "runs" / "again", *arguments)
    assert again.returncode == 0 and "tokens are written" not in again.stdout
    succeed(run_dir, *arguments, "--training.steps", "6", *RESUME)
    assert len(metrics(run_dir, "train")) == 6
    assert index.stat().st_mtime_ns == written


def test_several_processes_share_the_work_of_the_first(
    corpus: Corpus, text: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    arguments = [*_arguments(corpus, text), "--data.cache_dir", str(cache)]
    succeed(tmp_path / "run", *arguments, processes=2)
    assert len(list(cache.glob("mine-*_text_document.bin"))) == 1
    assert not list(cache.glob("*.unfinished"))


def test_what_cannot_be_read_is_one_line(corpus: Corpus, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    fine = Path(shutil.copy(CORPUS / "train.jsonl.zst", tmp_path / "mine.jsonl.zst"))
    in_file = ["--data.cache_dir", str(broken)]
    for path, more, words in (
        (tmp_path / "none.jsonl", [], "no such file"),
        (broken, [], "broken.jsonl:2"),
        (fine, in_file, "broken.jsonl: the tokens of data.train cannot be written here"),
    ):
        done = pretrain(tmp_path / "run", *_arguments(corpus, path), *more)
        assert done.returncode == 2
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert words in line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_settings_are_checked_before_the_text_is_read(corpus: Corpus, tmp_path: Path) -> None:
    text = Path(shutil.copy(CORPUS / "train.jsonl.zst", tmp_path / "mine.jsonl.zst"))
    for more, words in (
        (["--validation.path", str(tmp_path / "none.jsonl"), "--policy.name", "dwm"], "none.jsonl"),
        (["--training.micro_batch_size", "5"], "training.global_batch_size"),
    ):
        done = pretrain(tmp_path / "run", *_arguments(corpus, text), *more)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert not list(tmp_path.glob("prepared_data/*"))


def test_what_the_first_process_refuses_ends_all(corpus: Corpus, tmp_path: Path) -> None:
    """Ranks as srun starts them: none is stopped because another has failed."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    command = [sys.executable, "-m", "megatron_dwm.pretrain", *_arguments(corpus, broken)]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29123"}
    for _ in range(2):  # the second job finds what the first one left
        jobs = [
            subprocess.Popen(
                [*command, "--run.dir", str(tmp_path / "run")],
                env={**os.environ, **meeting, "RANK": rank, "LOCAL_RANK": rank},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in "01"
        ]
        said = [job.communicate(timeout=100)[1] for job in jobs]
        assert [job.returncode for job in jobs] == [2, 2], said
        assert "broken.jsonl:2" in said[0] and "--on-bad-record skip leaves" in said[0]


def test_what_an_earlier_job_refused_does_not_end_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Job names repeat; the first process removes the old file a little later than others look."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(for_run, "_POLL_S", 0.01)
    done, refused = tmp_path / "done", tmp_path / "refused"
    old = {"job": for_run._job(), "time_ns": 1, "error": "the disk is full"}
    refused.write_text(json.dumps(old))
    timers = [Timer(0.2, refused.unlink), Timer(0.4, done.touch)]
    for timer in timers:
        timer.start()
    for_run._wait_for(done, refused, old)
    done.unlink()
    refused.write_text(json.dumps({**old, "time_ns": 2}))
    with pytest.raises(UserError, match="the disk is full"):
        for_run._wait_for(done, refused, old)
    monkeypatch.setattr(for_run, "_REMOVED_S", 0.0)  # the first process left it there
    with pytest.raises(UserError, match="the disk is full"):
        for_run._wait_for(done, refused, {**old, "time_ns": 2})
