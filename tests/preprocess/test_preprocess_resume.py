"""Kill it at any moment, resume it, and get the bytes of a run that was never killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.pipeline import Stopped, preprocess
from megatron_dwm.preprocess.settings import PreprocessSettings

KILLS = 20
SUFFIXES = ("bin", "idx", "meta.parquet")
# Processes that start at once, from one that has no threads and has imported everything.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> list[Path]:
    """Three files of several formats with bad records in them."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = tmp_path_factory.mktemp("inputs")
    lines = (corpus_dir / "heldout.jsonl").read_bytes().splitlines(keepends=True)[:150]
    lines[10:10] = [b"broken\n", b'{"text": 5}\n', b'{"text": ""}\n', b"\n"]
    plain, packed, table = (directory / n for n in ("a.jsonl", "b.jsonl.gz", "c.parquet"))
    plain.write_bytes(b"".join(lines) * 4)
    packed.write_bytes(gzip.compress(b"".join(reversed(lines)) * 4)[:-30])
    texts = [json.loads(line)["text"] for line in lines[20:]]
    rows = {"text": [*texts, None] * 4, "n": list(range(4 * len(texts) + 4))}
    pq.write_table(pa.table(rows), table, row_group_size=30)
    return [plain, packed, table]


def settings_for(inputs: list[Path], prefix: Path, model: Path) -> PreprocessSettings:
    """Small chunks, and a checkpoint after each."""
    return PreprocessSettings(
        inputs=tuple(map(str, inputs)),
        output_prefix=str(prefix),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=str(model),
        append_eod=True,
        num_workers=2,
        metadata_keys=("n", "meta.redpajama_set_name"),
        on_bad_record="skip",
        resume=True,
        checkpoint_interval_s=0.0,
        chunk_bytes=20_000,
    )


def contents(prefix: Path) -> dict[str, bytes]:
    """All bytes that a run leaves."""
    names = [f"{prefix}_text_document.{suffix}" for suffix in SUFFIXES]
    return {n.removeprefix(str(prefix)): Path(n).read_bytes() for n in names} | {
        "rejects": Path(f"{prefix}.rejects.jsonl").read_bytes()
    }


def run_until_rename(settings: PreprocessSettings, fatal: int) -> None:
    """A run that is killed instead of its `fatal`-th rename: checkpoints and publication."""
    count = 0
    rename = Path.rename

    def rename_or_die(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = rename_or_die  # type: ignore[method-assign]
    preprocess(settings)


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, inputs: list[Path], model: Path
) -> dict[str, bytes]:
    """The bytes of one run that nothing disturbed, with one thread and large chunks."""
    prefix = tmp_path_factory.mktemp("expected") / "p"
    settings = settings_for(inputs, prefix, model)
    summary = preprocess(
        dataclasses.replace(settings, num_workers=1, chunk_bytes=1 << 20, resume=False)
    )
    assert summary.rejected.keys() == {
        "broken JSON", "wrong type", "truncated compressed stream"
    }  # fmt: skip
    assert not list(prefix.parent.glob("*.unfinished"))
    return contents(prefix)


def test_killed_at_random_moments(
    tmp_path: Path, inputs: list[Path], model: Path, expected: dict[str, bytes]
) -> None:
    generator = random.Random(5)
    settings = settings_for(inputs, tmp_path / "p", model)
    kills = 0
    while kills < KILLS:
        process = CONTEXT.Process(target=preprocess, args=(settings,))
        process.start()
        process.join(generator.uniform(0.02, 0.4))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            assert contents(tmp_path / "p") == expected
            for file in tmp_path.iterdir():
                file.unlink()
    preprocess(settings)
    assert contents(tmp_path / "p") == expected
    assert not (tmp_path / "p.unfinished").exists()


@pytest.mark.parametrize("back", range(7))
def test_killed_at_every_rename_of_the_publication(
    tmp_path: Path, inputs: list[Path], model: Path, expected: dict[str, bytes], back: int
) -> None:
    # The last renames of a run: checkpoint, checkpoint, sidecar, bin, rejects, idx, record.
    settings = settings_for(inputs, tmp_path / "p", model)
    settings = dataclasses.replace(settings, checkpoint_interval_s=1e9)
    # Before: run.json when the workspace is made.
    process = CONTEXT.Process(target=run_until_rename, args=(settings, 2 + back))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "p.preprocess.json").exists()
    preprocess(settings)
    assert contents(tmp_path / "p") == expected
    assert not (tmp_path / "p.unfinished").exists()


def interrupted(settings: PreprocessSettings, chunks: int = 5) -> None:
    """Leave a run that stopped after some chunks."""
    asked = iter(range(chunks))
    with pytest.raises(Stopped):
        preprocess(settings, lambda: next(asked, None) is None)


@pytest.mark.parametrize("chunk_bytes", [100_000])
def test_stopped_after_every_chunk(
    tmp_path: Path, inputs: list[Path], model: Path, expected: dict[str, bytes], chunk_bytes: int
) -> None:
    settings = settings_for(inputs, tmp_path / "p", model)
    settings = dataclasses.replace(settings, chunk_bytes=chunk_bytes)
    stops = 0
    while not (tmp_path / "p.preprocess.json").exists():
        with contextlib.suppress(Stopped):
            preprocess(settings, lambda: True)
            break
        stops += 1
    assert stops > len(expected["_text_document.bin"]) // chunk_bytes
    assert contents(tmp_path / "p") == expected


def test_complete_run_is_left_alone(tmp_path: Path, inputs: list[Path], model: Path) -> None:
    settings = settings_for(inputs, tmp_path / "p", model)
    first = preprocess(settings)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = preprocess(settings)
    assert second == dataclasses.replace(first, was_complete=True)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="complete, but not this run: --append-eod was on"):
        preprocess(dataclasses.replace(settings, append_eod=False))


def test_changed_run_is_refused_with_the_reason(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "some words of text", "n": 1}\n' * 1000)
    settings = settings_for([source], tmp_path / "p", model)
    settings = dataclasses.replace(settings, metadata_keys=("n",), chunk_bytes=3000)
    interrupted(settings)
    left = sorted(path.read_bytes() for path in (tmp_path / "p.unfinished").iterdir())
    for change, words in (
        ({"append_eod": False}, "--append-eod was on and is off"),
        ({"metadata_keys": ()}, "--metadata-keys was n and is empty"),
        ({"resume": False}, "pass --resume"),
    ):
        with pytest.raises(UserError, match=words):
            preprocess(dataclasses.replace(settings, **change))
    os.utime(source, ns=(1, 1))
    with pytest.raises(UserError, match=r"in\.jsonl has changed \(same size, another time"):
        preprocess(settings)
    source.write_bytes(b'{"text": "shorter"}\n')
    with pytest.raises(UserError, match=r"in\.jsonl has changed \(39000 bytes before, 20 now"):
        preprocess(settings)
    assert left == sorted(path.read_bytes() for path in (tmp_path / "p.unfinished").iterdir())


def test_skipping_may_begin_with_a_resume_but_not_end(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "in.jsonl"
    good = b'{"text": "some words of text", "n": 1}\n'
    source.write_bytes(good * 500 + b"broken\n" + good * 500)
    settings = settings_for([source], tmp_path / "p", model)
    settings = dataclasses.replace(
        settings, metadata_keys=("n",), on_bad_record="error", chunk_bytes=3000
    )
    with pytest.raises(UserError, match=r"in\.jsonl:501: broken JSON"):
        preprocess(settings)
    assert (tmp_path / "p.unfinished").exists(), "what was done is kept"
    skipping = dataclasses.replace(settings, on_bad_record="skip")
    interrupted(skipping, chunks=5)
    with pytest.raises(UserError, match="1 records have been skipped"):
        preprocess(settings)
    summary = preprocess(skipping)
    assert (summary.records, summary.datasets["text"].documents) == (1001, 1000)


def test_two_runs_at_once(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "some words of text", "n": 1}\n' * 1000)
    settings = dataclasses.replace(
        settings_for([source], tmp_path / "p", model), metadata_keys=("n",)
    )

    def second_run() -> bool:
        with pytest.raises(UserError, match="another run is writing here"):
            preprocess(settings)
        return False

    assert preprocess(settings, second_run).records == 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_one_line_and_can_be_resumed(
    tmp_path: Path, inputs: list[Path], model: Path, expected: dict[str, bytes], number: int
) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "tools/preprocess_data.py", "--input", *map(str, inputs)]
    command += f"--output-prefix {tmp_path / 'p'} --tokenizer-type SentencePieceTokenizer".split()
    command += f"--tokenizer-model {model} --append-eod --checkpoint-seconds 0 --resume".split()
    command += "--metadata-keys n meta.redpajama_set_name --on-bad-record skip".split()
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workspace = tmp_path / "p.unfinished"
    while not (workspace / "checkpoint.json").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    _, error = process.communicate()
    if process.returncode != 0:  # else it was through before the signal
        assert process.returncode == (130 if number == signal.SIGINT else 1)
        lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and "--resume goes on" in lines[0]
    assert subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 0
    assert contents(tmp_path / "p") == expected


def run_with_little_room(settings: PreprocessSettings, room_bytes: int) -> None:
    """A run in which no file may grow beyond `room_bytes`; leaves with 2 if it says so."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, room_bytes))
    try:
        preprocess(settings)
    except UserError as error:
        sys.exit(2 if "cannot be written" in str(error) and "--resume" in str(error) else 3)


def test_disk_that_is_full(
    tmp_path: Path, inputs: list[Path], model: Path, expected: dict[str, bytes]
) -> None:
    size = len(expected["_text_document.bin"])
    settings = settings_for(inputs, tmp_path / "p", model)
    for room_bytes in (size // 3, size // 2, size - 1):
        process = CONTEXT.Process(target=run_with_little_room, args=(settings, room_bytes))
        process.start()
        process.join()
        assert process.exitcode == 2
        assert [path.name for path in tmp_path.iterdir()] == ["p.unfinished"]
    preprocess(settings)
    assert contents(tmp_path / "p") == expected
