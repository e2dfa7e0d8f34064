"""Statistics against one document at a time in plain Python, and the table around them."""

from __future__ import annotations

import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from megatron_dwm.files.lock import only_writer
from megatron_dwm.selection.statistics import STATISTICS, Texts
from megatron_dwm.selection.words import TextBatch
from tests.selection.conftest import Run, pq_table
from tests.selection.test_dsir import texts_of
from tests.selection.test_words import TEXTS


def direct(text: str) -> dict[str, float]:
    """All statistics of one text."""
    words = re.findall(r"\w+", text.lower())
    content = text.encode()
    return {
        "length": len(text),
        "type_token_ratio": len(set(words)) / len(words) if words else 0.0,
        "symbol_share": len(re.findall(r"[^\w\s]", text)) / len(text) if text else 0.0,
        "compression_ratio": len(zlib.compress(content)) / len(content) if text else 0.0,
        "mean_word_length": sum(map(len, words)) / len(words) if words else 0.0,
    }


def test_awkward_texts() -> None:
    texts = Texts(TextBatch.of(TEXTS))
    for name, statistic in STATISTICS.items():
        expected = [direct(text)[name] for text in TEXTS]
        np.testing.assert_allclose(statistic(texts), expected, rtol=1e-12, err_msg=name)


@pytest.fixture
def copied(corpus: str, tmp_path: Path) -> str:
    """A dataset of its own."""
    for ending in (".bin", ".idx", ".meta.parquet"):
        shutil.copy(corpus + ending, tmp_path / f"d{ending}")
    return str(tmp_path / "d")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_columns_are_added(copied: str, model: Path, run: Run, num_workers: int) -> None:
    before = pq_table(f"{copied}.meta.parquet")
    command = ("score_data.py", "--input", copied, "--tokenizer", model, "--workers", num_workers)
    done = run(*command, "--columns", *STATISTICS)
    assert done.returncode == 0, done.stderr
    after = pq_table(f"{copied}.meta.parquet")
    assert after.select(before.column_names).equals(before)
    assert after.schema.metadata == before.schema.metadata
    expected = [direct(text) for text in texts_of(copied, model)]
    for name in STATISTICS:
        found = after.column(name).to_numpy()
        np.testing.assert_allclose(found, [e[name] for e in expected], rtol=1e-12)

    done = run(*command, "--columns", "length")
    assert done.returncode == 2
    assert "has a column length; pass --replace" in done.stderr
    assert run(*command, "--columns", "length", "--replace").returncode == 0
    assert pq_table(f"{copied}.meta.parquet").equals(after)
    assert sorted(p.name for p in Path(copied).parent.iterdir()) == [
        *("d.bin", "d.idx", "d.meta.parquet"),
    ]


def test_mistakes(copied: str, model: Path, run: Run) -> None:
    common = ("score_data.py", "--input", copied, "--tokenizer", model)
    for options, words in (
        (("--columns", "lenght"), "--columns lenght: not known; choose among length, type_token"),
        (("--columns", "length", "length"), "--columns length: named twice"),
        (("--columns", "length", "--workers", 0), "--workers 0: expected 1 or more"),
    ):
        done = run(*common, *options)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr
    with only_writer(Path(f"{copied}.meta.parquet")):
        done = run(*common, "--columns", "length")
    assert done.returncode == 2 and "another process is writing it" in done.stderr
    Path(f"{copied}.meta.parquet").unlink()
    done = run(*common, "--columns", "length")
    assert done.returncode == 2
    assert "d.meta.parquet: no such file; python tools/score_data.py reads" in done.stderr
