"""Preprocessing against gigatoken alone and against a pool of SentencePiece workers.

Each contestant runs in a process of its own on the same bytes, in turn, round after round; the
process measures the time of its work (not of its imports) and its peak memory. Contestants:

    ours              `preprocess_data.py`'s work, index, sidecar and checks included
    ours, zstd        the same from a compressed file
    gigatoken alone   `encode_files` of the file to ids in memory, nothing written
    pool of workers   a process pool that parses and runs sentencepiece a document at a time, as
                      Megatron-LM's tool does; one process joins and writes
    merge, cat        `merge_datasets` of two halves, and `cat` of the same three files; both force
                      their files to the disk

A ratio is the median over rounds of rates that were measured in turn: by the clock, and by
processor time, which is steadier on a machine that does other work, too.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zstandard

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.read.texts import read_lines_of

_OURS, _ZSTD, _GIGATOKEN, _POOL = "ours", "ours, zstd", "gigatoken alone", "pool of workers"
_MERGE, _CAT = "merge", "cat"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One contestant in one round."""

    seconds: float
    cpu_seconds: float
    """processor time of the process and its workers"""
    tokens: int
    peak_bytes: int


def measure_preprocessing(
    source: Path, model: Path, *, size_mb: int, rounds: int, workers: int, pool_mb: int
) -> None:
    """Repeat the documents of `source` to `size_mb` MB, run the rounds and print the table.

    The pool, which is slow, gets the first `pool_mb` MB; rates are compared.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-preprocess-") as directory:
        work = Path(directory)
        whole = _corpus(source, work / "corpus.jsonl", size_mb << 20)
        part = _corpus(source, work / "part.jsonl", pool_mb << 20)
        packed = work / "corpus.jsonl.zst"
        with whole.open("rb") as plain, packed.open("wb") as target:
            zstandard.ZstdCompressor(level=3).copy_stream(plain, target)
        inputs = {_OURS: whole, _ZSTD: packed, _GIGATOKEN: whole, _POOL: part}
        found: dict[str, list[Measured]] = {}
        for _ in range(rounds):
            for name, file in inputs.items():
                measured = _run(name, file, model, work, workers)
                found.setdefault(name, []).append(measured)
            _run("halves", whole, model, work, workers)
            for name in (_MERGE, _CAT):
                found.setdefault(name, []).append(_run(name, whole, model, work, workers))
        sizes = {name: (part if name == _POOL else whole).stat().st_size for name in found}
        _print(found, sizes, rounds, workers)


def _corpus(source: Path, target: Path, size_bytes: int) -> Path:
    lines = [line + b"\n" for _, line in read_lines_of([str(source)])]
    if not lines:
        raise UserError(f"{source}: no records to measure with")
    written = 0
    with target.open("wb") as file:
        while written < size_bytes:
            for line in lines:
                written += file.write(line)
                if written >= size_bytes:
                    break
    return target


def _run(name: str, file: Path, model: Path, work: Path, workers: int) -> Measured:
    output = work / "output"
    if name not in (_MERGE, _CAT):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.preprocess_contestants",
            name,
            *map(str, (file, model.resolve(), output, workers)),
        ],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _print(
    found: dict[str, list[Measured]], sizes: dict[str, int], rounds: int, workers: int
) -> None:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"`python tools/benchmark.py {' '.join(sys.argv[1:])}`\n")
    print(
        f"{sizes[_OURS] / 1e6:.0f} MB of JSON Lines ({sizes[_POOL] / 1e6:.0f} MB for the pool), "
        f"{workers} workers, {rounds} rounds, load average {load} (1, 5, 15 min) on "
        f"{os.cpu_count()} cores\n"
    )
    pairs = {_OURS: _GIGATOKEN, _ZSTD: _OURS, _GIGATOKEN: _OURS, _POOL: _OURS, _MERGE: _CAT}
    rows = []
    for name, all_rounds in found.items():
        seconds = statistics.median(m.seconds for m in all_rounds)
        rows.append(
            [
                name,
                f"{sizes[name] / 1e6 / seconds:.1f}",
                f"{all_rounds[0].tokens / 1e6 / seconds:.2f}",
                f"{max(m.peak_bytes for m in all_rounds) / 1e6:.0f}",
                *_ratios(name, pairs.get(name), found, sizes),
            ]
        )
    columns = ["on the same bytes", "MB/s of JSON Lines", "M tokens/s", "peak MB"]
    columns += ["ratio of rates", "by processor time"]
    for cells in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(cells) + " |")


def _ratios(
    name: str, other: str | None, found: dict[str, list[Measured]], sizes: dict[str, int]
) -> list[str]:
    if other is None:
        return ["", ""]
    rounds = list(zip(found[name], found[other], strict=True))
    scale = sizes[name] / sizes[other]
    by_clock = [scale * b.seconds / a.seconds for a, b in rounds]
    by_processor = [scale * b.cpu_seconds / a.cpu_seconds for a, b in rounds]
    return [f"{_spread(by_clock)} of {other}", _spread(by_processor)]


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
