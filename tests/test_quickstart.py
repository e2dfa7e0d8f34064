"""The README's first command, shortened: every part of the main job runs and leaves its files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
LIMIT_S = 400
SCRIPT = ["bash", str(REPOSITORY / "examples" / "quickstart.sh")]


def test_quickstart_from_raw_text_to_table(tmp_path: Path) -> None:
    workdir = tmp_path / "a work dir"  # spaces happen
    done = subprocess.run(
        [*SCRIPT, str(workdir)],
        env={**os.environ, "STEPS": "12"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("held-out loss") :]
    for word in ("target", "perplexity", "random_words", "effective sample size", "preprocessing"):
        assert word in table
    for file in (
        "data/tokenizer.model",
        "data/corpus_text_document.idx",
        "data/corpus_text_document.meta.parquet",
        "runs/dwm/report/report.html",
        "runs/dwm/report/weight_by_domain.png",
        "runs/dwm/report/benchmarks.png",
        "runs/uniform/metrics.jsonl",
        "runs/dwm_own/metrics.jsonl",
        "export/dwm/model.safetensors",
        "export/uniform.json",
    ):
        assert (workdir / file).is_file(), file


def test_a_used_workdir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = subprocess.run([*SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
