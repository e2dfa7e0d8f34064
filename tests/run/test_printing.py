"""A name that comes from data cannot write a line of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from tests.small_runs.command import metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

FORGED = "books\x1b[2K\nstep 20/20 stage 1 loss 0.0001"


def test_a_domain_forges_no_line_of_progress(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"text": "one two three four " * 40, "domain": FORGED}) + "\n")
    mine = ["--training.steps", "2", "--evaluation.path", str(held_out)]
    job = server.succeed(tmp_path / "run", [*corpus.arguments(), *mine])
    assert "\x1b" not in job.text
    assert not [line for line in job.text.splitlines() if line.startswith("step 20/20")]
    assert r"held-out loss: books\x1b[2K\nstep 20/20 stage 1 loss 0.0001 " in job.text
    [line] = metrics(tmp_path / "run", "evaluation")
    assert list(line["domain_loss"]) == [FORGED], "files keep the name as it is"


def test_a_column_forges_no_line_of_an_error(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    for end in ("bin", "idx"):
        (tmp_path / f"data.{end}").symlink_to(f"{corpus.prefix}.{end}")
    table = pq.read_table(f"{corpus.prefix}.meta.parquet")
    table = table.rename_columns([FORGED if n == "domain" else n for n in table.column_names])
    pq.write_table(table, tmp_path / "data.meta.parquet")
    job = server.run(
        tmp_path / "run", [*corpus.arguments(), "--data.train", str(tmp_path / "data")]
    )
    assert job.codes == [2] and "\x1b" not in job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert line.endswith(r"it has books\x1b[2K\nstep 20/20 stage 1 loss 0.0001")
