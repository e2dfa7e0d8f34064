"""The sections on preferences, documents, credit and tokens: what they say of odd runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_dwm.report.content import Content, Figure
from megatron_dwm.report.run_report import Request, contents_of, read_runs, write_report
from megatron_dwm.report.sections.documents import without_controls
from tests.report.random_weights import DOCUMENTS, Row, random_rows, write_rows
from tests.small_runs.fixtures import Corpus, preprocessed

ROOT = Path(__file__).parents[2]
MINE = ("preferences", "tokens", "documents", "credit")
_BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from megatron_dwm.report.run_report import Request, write_report
from pathlib import Path
write_report(Request(run_dir=Path(sys.argv[1])))
assert "torch" not in sys.modules
"""


@pytest.fixture
def run_dir(corpus: Corpus, tmp_path: Path) -> Path:
    """A run of random weights with documents whose text is HTML."""
    file = tmp_path / "text.jsonl"
    texts = [f"<script>alert({n})</script> text {n}" for n in range(DOCUMENTS)]
    lines = [{"text": text, "domain": "d"} for text in texts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"train": [preprocessed(file, corpus.tokenizer).prefix], "tokenizer": corpus.tokenizer}
    return _configured(write_rows(tmp_path / "run", random_rows()), data)


def _configured(run_dir: Path, data: dict) -> Path:
    config = {
        "data": {**data, "domain_key": "domain", "sequence_length": 32},
        "training": {"global_batch_size": 8},
        "policy": {"name": "dwm"},
        "weighting": {"unit": "sample"},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir


def sections_of(run_dir: Path) -> dict[str, Content]:
    contents = contents_of(read_runs(Request(run_dir=run_dir)))
    return {content.id: content for content in contents if content.id in MINE}


def notes_of(run_dir: Path) -> str:
    return "\n".join(note for content in sections_of(run_dir).values() for note in content.notes)


def figures_of(run_dir: Path) -> dict[str, Figure]:
    contents = sections_of(run_dir).values()
    return {figure.id: figure for content in contents for figure in content.figures}


def test_the_page_of_a_whole_run(run_dir: Path) -> None:
    sections = sections_of(run_dir)
    assert list(sections) == ["preferences", "documents", "credit"]
    assert notes_of(run_dir) == ""
    assert set(figures_of(run_dir)) == {
        "score_correlation",
        "alignment_correlation",
        "weight_by_alignment",
    }
    documents = sections["documents"].values["documents"]
    assert {d["stage"] for d in documents} == {1, 2, 3}
    assert all(
        d["text"] == f"<script>alert({d['number']})</script> text {d['number']}" for d in documents
    )
    written = write_report(Request(run_dir=run_dir))
    page = written[0].read_text()
    assert "&lt;script&gt;alert(" in page and "<script>alert(" not in page
    credit = pq.read_table(run_dir / "report" / "credit_by_document.parquet").to_pylist()
    assert [row["record"] for row in credit] == [row["document_id"] for row in credit]
    assert written[-1].name == "credit_by_document.parquet"


def test_torch_is_not_needed(run_dir: Path) -> None:
    """Not even where it cannot be imported: a laptop has the report's extra only."""
    command = [sys.executable, "-c", _BLOCKED, str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (run_dir / "report" / "report.html").read_text()
    assert "&lt;script&gt;alert(" in page


def test_uniform_weights_and_a_run_of_one_step(run_dir: Path) -> None:
    rows = [row for row in random_rows() if row["step"] == 2]
    uniform = [{**row, "weight": 1.0, "alignment": None} for row in rows]
    shutil.rmtree(run_dir / "weights")
    write_rows(run_dir, uniform, files=1)
    notes = notes_of(run_dir)
    assert "Weights or scores are the same in all rows" in notes
    assert "No alignments are recorded" in notes
    assert "credit" not in sections_of(run_dir) and not figures_of(run_dir)
    assert write_report(Request(run_dir=run_dir))


def test_without_weights(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "weights")
    notes = notes_of(run_dir)
    assert "run: no weights are recorded, so there are no preferences." in notes
    assert "run: no weights are recorded, so no document is wanted more." in notes
    assert write_report(Request(run_dir=run_dir))


def test_data_that_are_gone(run_dir: Path) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    [prefix] = config["data"]["train"]
    Path(f"{prefix}.meta.parquet").unlink()
    assert "is missing: its documents have no source and no scores" in notes_of(run_dir)
    assert figures_of(run_dir)["score_correlation"].num_rows, "the texts are still there"
    Path(f"{prefix}.bin").unlink()
    notes = notes_of(run_dir)
    assert "the data have moved, so their documents have numbers instead of text" in notes
    assert "neither scores in a sidecar nor a text that can be read" in notes
    page = write_report(Request(run_dir=run_dir))[0].read_text()
    assert "The text cannot be read." in page
    (run_dir / "config.yaml").unlink()
    assert "no text of documents: data.train is empty" in notes_of(run_dir)
    assert "there are no drops" in notes_of(run_dir)
    assert write_report(Request(run_dir=run_dir))


def test_half_written_lines_and_unknown_columns(run_dir: Path) -> None:
    expected = figures_of(run_dir)["alignment_correlation"].data
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "phase": "tra')
    for path in (run_dir / "weights").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.append_column("later", pa.array([{"a": 1}] * len(table))), path)
    assert figures_of(run_dir)["alignment_correlation"].data == expected


def test_weights_without_documents(run_dir: Path) -> None:
    for path in (run_dir / "weights").iterdir():
        pq.write_table(pq.read_table(path).drop_columns("document_id"), path)
    assert "weights/*.parquet has no document of a weight" in notes_of(run_dir)
    assert write_report(Request(run_dir=run_dir))


def test_domains_named_in_html(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "weights")
    rows: list[Row] = [{**row, "domain": "<i>x</i>"} for row in random_rows()]
    write_rows(run_dir, rows)
    page = write_report(Request(run_dir=run_dir))[0].read_text()
    outside = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    assert "&lt;i&gt;x&lt;/i&gt;" in outside and "<i>x</i>" not in outside


def test_token_weights_that_are_missing_or_broken(run_dir: Path) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["weighting"]["unit"] = "token"
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert "run: no tokens in token_weights/*.parquet" in notes_of(run_dir)
    (run_dir / "token_weights").mkdir()
    (run_dir / "token_weights" / "cut.parquet").write_bytes(b"PAR1")
    notes = notes_of(run_dir)
    assert "cut.parquet is left out" in notes and "No excess losses are recorded" in notes
    assert write_report(Request(run_dir=run_dir))


def test_many_stages_and_long_texts_stay_small(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "weights")
    rows = [{**row, "stage": row["step"]} for row in random_rows(steps=600)]
    write_rows(run_dir, rows)
    documents = sections_of(run_dir)["documents"].values["documents"]
    assert len(documents) <= 600 and {d["stage"] for d in documents} >= {2, 600}


def test_control_characters() -> None:
    assert (
        without_controls("a\n\tb\x00\x1b\x7f\x9fé\u200f漢")
        == "a\n\tb\ufffd\ufffd\ufffd\ufffdé\u200f漢"
    )
