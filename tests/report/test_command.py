"""The command: what it writes, what it says is missing, and how it ends on mistakes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_dwm.report.run_report import Request, contents_of, read_runs, write_report
from megatron_dwm.report.watch import state_of
from tests.forking.client import run_python

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"


def report(*arguments: str | Path, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    return run_python(["tools/report.py", *map(str, arguments)], fresh=fresh)


def notes_of(run: Path, *compare: Path) -> list[str]:
    contents = contents_of(read_runs(Request(run_dir=run, compare=compare)))
    return [note for content in contents for note in content.notes]


def test_it_writes_a_page_and_a_png_of_every_figure(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", steps=100)
    done = report(run, fresh=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    paths = [Path(line) for line in done.stdout.split()]
    assert paths[0] == run / "report" / "report.html"
    assert {"weight_by_domain.png", "loss.png"} <= {path.name for path in paths}
    assert paths.pop() == run / "report" / "credit_by_document.parquet"
    assert all(path.read_bytes().startswith(PNG) for path in paths[1:])
    page = paths[0].read_text()
    ids = re.findall(r'<figure class="[^"]*" id="figure-(\w+)">', page)
    assert [path.stem for path in paths[1:]] == ids
    assert len(page) < 2_000_000
    elements = re.sub("<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!#)', elements), "the page must not fetch anything"


def test_a_run_without_weights_gets_a_page(make_run: Callable[..., Path], tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", steps=100)
    shutil.rmtree(bare / "weights")
    written = write_report(Request(run_dir=bare))
    names = {path.name for path in written}
    assert names == {"report.html", "loss.png", "held_out_loss.png", "tokens_per_second.png"}
    notes = notes_of(bare)
    assert any(note.startswith("bare: no weights in weights/*.parquet") for note in notes)
    assert "bare: config.yaml is missing, so settings are unknown" in notes
    page = written[0].read_text()
    assert "no weights in weights/*.parquet" in page and "config.yaml is missing" in page


def test_a_run_of_one_step_gets_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    line = {"step": 1, "stage": 1, "phase": "train", "loss": 7.0, "new_key": {"x": [1]}}
    lost = {**line, "phase": "evaluation", "loss": float("nan"), "domain_loss": {}}
    (run / "metrics.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(lost)}\n")
    (run / "starts.jsonl").write_text('{"step": 0}\n{"ste')
    (run / "config.yaml").write_text("run: [\n")
    written = write_report(Request(run_dir=run))
    assert [path.name for path in written] == ["report.html", "loss.png"]
    notes = notes_of(run)
    assert any("config.yaml cannot be read" in note for note in notes)
    assert any("No held-out losses" in note for note in notes)


def test_columns_that_are_unknown_or_missing_do_no_harm(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", steps=100)
    for path in (run / "weights").iterdir():
        table = pq.read_table(path).drop_columns(["alignment", "document_id", "stage"])
        pq.write_table(table.append_column("novel", table["weight"]), path)
    names = {path.name for path in write_report(Request(run_dir=run))}
    assert "weight_by_domain.png" in names and "weight_distribution.png" in names


def test_text_from_data_is_shown_as_text(make_run: Callable[..., Path], tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script><b>$x$"
    run = make_run(tmp_path / "run", steps=100, config={"policy": {"name": name}})
    table = pq.read_table(run / "weights" / "005.parquet")
    domains = [name if d == "web" else d for d in table["domain"].to_pylist()]
    table = table.set_column(table.column_names.index("domain"), "domain", [domains])
    pq.write_table(table, run / "weights" / "005.parquet")
    with (run / "metrics.jsonl").open("a") as stream:
        evaluation = {"step": 100, "phase": "evaluation", "domain_loss": {name: 3.0}}
        skipped = {"step": 7, "phase": "skipped", "reason": f"odd\x1b[2K\nloss {name}"}
        stream.write(f"{json.dumps(evaluation)}\n{json.dumps(skipped)}\n")
    written = write_report(Request(run_dir=run))
    page = written[0].read_text()
    assert "<script>alert" not in page and "<b>$x$" not in page
    assert "&lt;script&gt;alert(1)" in page and r"\u003cscript\u003ealert(1)" in page
    assert r"odd\x1b[2K" in page and "\x1b" not in page


def test_skipped_steps_are_reported(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=100)
    lines = [
        {"step": 101, "phase": "skipped", "reason": "the loss is nan"},
        {"step": 102, "phase": "skipped", "reason": "the loss is nan"},
        {"step": 102, "phase": "skipped_update", "reason": "an alignment is inf", "update": 7},
        {"step": 102, "phase": "skipped_update", "reason": "an alignment is inf", "update": 8},
    ]
    with (run / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    assert {
        "run: skipped 2 times: step: the loss is nan",
        "run: skipped 2 times: weighting update: an alignment is inf",
    } <= set(notes_of(run))


def test_a_file_in_the_place_of_the_plots_folder_is_left_alone(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", steps=100)
    (run / "report").write_text("mine")
    done = report(run)
    assert done.returncode == 2 and (run / "report").read_text() == "mine"
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {run / 'report'}/") and "(Not a directory)" in line


def test_mistakes_are_one_line_and_exit_code_2(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", steps=100)
    broken = make_run(tmp_path / "broken", steps=100)
    (broken / "weights" / "003.parquet").write_bytes(b"PAR1 not really")
    torn = make_run(tmp_path / "torn", steps=100)
    (torn / "metrics.jsonl").write_text('{"step": 1, "phase": "train"}\n{"step"\n')
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("run: {}\n")
    cases = [
        ((tmp_path,), "is not a run: it has no metrics.jsonl"),
        ((tmp_path / "gone",), "is not a run"),
        ((begun,), "metrics.jsonl is not there yet"),
        ((run, "--compare", tmp_path), "is not a run"),
        ((broken,), "003.parquet has no weights of a run"),
        ((torn,), "metrics.jsonl line 2 is not JSON"),
        ((run, "--target-domain", "novels"), "--target-domain novels is not a held-out domain"),
        ((run, "--baseline", "other"), "--baseline other is not a run of this report"),
        ((run, "--scores", "other.json"), "--scores other.json: no run is called other"),
        (
            (run, "--scores", f"run={torn}/metrics.jsonl"),
            "not a file that python tools/evaluate.py",
        ),
        ((run, "--watch", "0"), "argument --watch: invalid number of seconds from 1 to 86400"),
    ]
    for arguments, message in cases:
        done = report(*arguments)
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1 and done.stdout == "", done
        assert lines[0].startswith("error: ") and message in lines[0]
    assert not list(tmp_path.glob("*/report"))


def test_a_change_of_a_run_is_seen(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=100)
    before = state_of([run])
    assert state_of([run]) == before
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 101, "phase": "train", "loss": 3.0}\n')
    assert state_of([run]) != before


@pytest.mark.timeout(120)
def test_a_watched_page_follows_the_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """The page is written when the run begins to write, and again after the next step."""
    made = make_run(tmp_path / "made", steps=100)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run: {}\n")
    command = [sys.executable, "tools/report.py", str(run), "--watch", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that runs the tests in the background makes what it starts ignore Ctrl-C.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heed, **pipes) as process:
        try:
            assert process.stderr.readline().startswith("watching")
            assert process.stderr.readline().startswith("waiting: ")
            shutil.copy(made / "metrics.jsonl", run / "metrics.jsonl")
            assert process.stdout.readline() == f"{run}/report/report.html: step 100\n"
            assert 'data-reload-s="1.0"' in (run / "report" / "report.html").read_text()
            with (run / "metrics.jsonl").open("a") as stream:
                stream.write('{"step": 101, "phase": "train", "loss": 3.0}\n')
            assert process.stdout.readline() == f"{run}/report/report.html: step 101\n"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "no longer watching\n"
        assert process.wait() == 0


def test_torch_is_not_imported() -> None:
    program = (
        "import sys, megatron_dwm.report.sections, megatron_dwm.report.page\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)
