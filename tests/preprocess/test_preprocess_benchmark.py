"""The benchmark runs and prints the rows it promises."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]
ROWS = ["ours", "ours, zstd", "gigatoken alone", "pool of workers", "merge", "cat"]


def test_rows(corpus_dir: Path, model: Path, run_fresh: Run) -> None:
    options = "--size-mb 1 --pool-mb 1 --rounds 1 --workers 2".split()
    done = run_fresh(
        "benchmark.py", "preprocess", "--input", corpus_dir / "train.jsonl.zst",
        "--tokenizer-model", model, *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = {cells[0].removeprefix("| "): cells[1:] for cells in table[2:]}
    assert list(rows) == ROWS
    for name, cells in rows.items():
        assert all(float(cell) > 0 for cell in cells[:3]), name
    # All of them made the same ids of the same bytes.
    assert rows["ours"][1] != "0.00" and " of gigatoken alone" in rows["ours"][3]
