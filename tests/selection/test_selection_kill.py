"""`kill -9` at any moment: no file under its name, or a selection that the next run completes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dwm.selection.choice import Draw
from megatron_dwm.selection.select import Selection, select
from megatron_dwm.selection.uniform import UniformScores
from tests.selection.conftest import Dataset, quiet

NAMES = ("o.select.json", "o.meta.parquet", "o.bin", "o.idx")


def selection_at(prefix: str, output: Path) -> Callable[[], object]:
    """The selection under test."""
    selection = Selection(
        input_prefix=prefix,
        output_prefix=str(output),
        draw=Draw(tokens=2_000, seed=5),
        domain_key="meta.redpajama_set_name",
        names_domain_key=False,
    )
    return lambda: select(selection, UniformScores(), quiet)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of the selection in `folder`."""
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}


def killed_at_rename(run: Callable[[], object], fatal: int) -> int | None:
    """Exit code of a process that kills itself instead of its `fatal`-th rename."""

    def child() -> None:
        rename, count = Path.rename, 0

        def counted(path: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        Path.rename = counted  # type: ignore[method-assign]
        run()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture
def whole(dataset: Dataset, tmp_path: Path) -> dict[str, bytes]:
    """What a run that is not killed writes."""
    (tmp_path / "whole").mkdir()
    selection_at(dataset.prefix, tmp_path / "whole" / "o")()
    return contents(tmp_path / "whole")


def test_killed_at_every_rename(dataset: Dataset, tmp_path: Path, whole: dict[str, bytes]) -> None:
    fatal, code = 0, None
    while code != 0:
        fatal += 1
        folder = tmp_path / str(fatal)
        folder.mkdir()
        run = selection_at(dataset.prefix, folder / "o")
        code = killed_at_rename(run, fatal)
        assert code in (0, -signal.SIGKILL)
        found = contents(folder)
        assert all(whole[name] == content for name, content in found.items())
        assert ("o.idx" in found) == (code == 0)
        run()
        assert contents(folder) == whole
        assert sorted(p.name for p in folder.iterdir()) == sorted(NAMES)
    assert fatal == 6  # the record's own rename, four of the files, and none


def test_killed_at_random_moments(
    dataset: Dataset, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    generator = random.Random(4)
    context = multiprocessing.get_context("fork")
    for number in range(25):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = selection_at(dataset.prefix, folder / "o")
        process = context.Process(target=run)
        process.start()
        time.sleep(generator.uniform(0, 0.06))
        process.kill()
        process.join()
        found = contents(folder)
        assert all(whole[name] == content for name, content in found.items())
        run()
        assert contents(folder) == whole
