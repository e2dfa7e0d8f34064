"""The benchmark of checkpoints prints the rows that it promises."""

from __future__ import annotations

from tests.tools.test_benchmark import TINY, numbers, run, tables

ROWS = {
    "torch.save of the same tensors",
    "torch.save, forced to the disk",
    "checkpoint",
    "copy of the tensors in host memory",
    "asynchronous checkpoint: training stands still",
}


def test_checkpoint() -> None:
    done = run("checkpoint", *TINY)
    assert done.returncode == 0, done.stderr
    rows = tables(done.stdout)["one save"]
    assert set(rows) == ROWS
    assert all(value > 0 for cells in rows.values() for value in numbers(cells))
