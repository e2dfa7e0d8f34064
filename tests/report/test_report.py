"""The report's numbers against plain Python over the files, and how the command ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.config.errors import UserError
from megatron_dwm.report.figures import spread
from megatron_dwm.report.run_files import read_metrics, read_weights
from megatron_dwm.report.run_report import run_names, write_report
from megatron_dwm.report.tables import (
    first_steps_of_stages,
    held_out_loss,
    mean_weight_by_domain,
    training_loss,
    weight_by_domain_over_steps,
)
from tests.forking.client import run_python

ROOT = Path(__file__).parents[2]


def rows_of(run: Path) -> list[dict]:
    paths = sorted((run / "weights").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def mean_by_domain(rows: list[dict]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["domain"], []).append(row["weight"])
    return {name: sum(values) / len(values) for name, values in groups.items()}


def report(*arguments: str | Path, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    return run_python(["tools/report.py", *map(str, arguments)], fresh=fresh)


def test_mean_weight_by_domain_over_the_last_steps(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    late = [row for row in rows_of(run) if row["step"] > 1000 - 200]
    assert mean_weight_by_domain(run, 200) == pytest.approx(mean_by_domain(late), rel=1e-6)
    everything = mean_weight_by_domain(run, 10_000)
    assert everything == pytest.approx(mean_by_domain(rows_of(run)), rel=1e-6)
    last = [row for row in rows_of(run) if row["step"] == 1000]
    assert mean_weight_by_domain(run, 1) == pytest.approx(mean_by_domain(last), rel=1e-6)


def test_skipped_steps_are_reported(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make_run(tmp_path / "run")
    lines = [
        {"step": 1001, "phase": "skipped", "reason": "the loss is nan"},
        {"step": 1002, "phase": "skipped", "reason": "the loss is nan"},
        {"step": 1002, "phase": "skipped_update", "reason": "an alignment is inf", "update": 7},
        {"step": 1002, "phase": "skipped_update", "reason": "an alignment is inf", "update": 8},
    ]
    with (run / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    write_report(run)
    assert capsys.readouterr().err.splitlines() == [
        "run: skipped 2 times: step: the loss is nan",
        "run: skipped 2 times: weighting update: an alignment is inf",
    ]


def test_bins_hold_the_mean_of_their_steps(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rows = rows_of(run)
    series = weight_by_domain_over_steps(read_weights(run), max_bins=10)
    for number in range(10):  # steps 10..1000: ten bins of ten recorded steps
        steps = range(100 * number + 10, 100 * number + 101, 10)
        expected = mean_by_domain([row for row in rows if row["step"] in steps])
        for name, line in series.items():
            assert line.step[number] == np.mean(steps)
            assert line.value[number] == pytest.approx(expected[name], rel=1e-6)
    assert first_steps_of_stages(read_weights(run)) == [210, 410, 610, 810]


def test_losses_are_those_of_the_file(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line["loss"] for line in lines if line["phase"] == "train"]
    every = training_loss(read_metrics(run), max_bins=5000)
    assert every.value.tolist() == train and every.step.tolist() == list(range(1, 1001))
    binned = training_loss(read_metrics(run), max_bins=100)
    assert binned.value[3] == pytest.approx(sum(train[30:40]) / 10)
    assert binned.step[3] == pytest.approx(35.5)
    target = held_out_loss(read_metrics(run))["target"]
    expected = [line["domain_loss"]["target"] for line in lines if line["phase"] == "evaluation"]
    assert target.value.tolist() == expected


def test_drawn_lines_carry_these_numbers(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn = []
    original = Figure.savefig

    def keep(figure: Figure, *arguments: object, **options: object) -> None:
        drawn.append(figure)
        original(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    run, other = make_run(tmp_path / "dwm", gain=0.4), make_run(tmp_path / "uniform", seed=1)
    paths = write_report(run, [other])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    weights, losses = drawn
    lines = {line.get_label(): line for line in weights.axes[0].get_lines()}
    bin_of = [row for row in rows_of(run) if row["step"] > 970]  # the last of 40 bins
    for name, mean in mean_by_domain(bin_of).items():
        assert lines[name].get_ydata()[-1] == pytest.approx(mean, rel=1e-6)
    assert any(list(line.get_ydata()) == [1.0, 1.0] for line in lines.values())
    named = {text.get_text().split("  ")[0] for text in weights.axes[0].texts}
    assert named == set(mean_by_domain(bin_of))
    target = losses.axes[1]
    assert target.get_title(loc="left") == "held out: target"
    shown = {line.get_label(): line.get_ydata() for line in target.get_lines()}
    for name, folder in (("dwm", run), ("uniform", other)):
        expected = held_out_loss(read_metrics(folder))["target"].value
        assert np.array_equal(shown[name], expected)


def test_names_of_domains_are_drawn_as_they_are_written(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dollar sign starts no formula, and a skipped step's reason no new line."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    run, name = make_run(tmp_path / "run"), "a$\\frac$\nb$"
    table = pq.read_table(run / "weights" / "005.parquet")
    domains = [name if d == "web" else d for d in table["domain"].to_pylist()]
    table = table.set_column(table.column_names.index("domain"), "domain", [domains])
    pq.write_table(table, run / "weights" / "005.parquet")
    with (run / "metrics.jsonl").open("a") as stream:
        evaluation = {"step": 1000, "phase": "evaluation", "domain_loss": {name: 3.0}}
        skipped = {"step": 7, "phase": "skipped", "reason": "odd\x1b[2K\nloss"}
        stream.write(f"{json.dumps(evaluation)}\n{json.dumps(skipped)}\n")
    write_report(run)
    for figure in drawn:
        figure.draw_without_rendering()
    titles = [axes.get_title(loc="left") for axes in drawn[1].axes]
    assert r"held out: a\$\frac\$\nb\$" in titles
    assert r"odd\x1b[2K\nloss" in report(run).stderr


def test_steps_written_twice_count_once_and_an_unfinished_line_is_left_out(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    metrics, weights = read_metrics(run), read_weights(run)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 990, "phase": "train", "loss": 9.0}\n{"step": 991, "pha')
    shutil.copy(run / "weights" / "005.parquet", run / "weights" / "006.parquet")
    again = read_metrics(run)
    assert len(again) == len(metrics)
    assert [r["loss"] for r in again if r["step"] == 990 and r["phase"] == "train"] == [9.0]
    assert len(read_weights(run).step) == len(weights.step)


@pytest.mark.parametrize("old", [False, True], ids=["with source", "before it"])
def test_samples_of_steps_and_of_updates_are_not_taken_for_each_other(
    make_run: Callable[..., Path], tmp_path: Path, old: bool
) -> None:
    """Both number their samples from 0; files of older versions have no column that says which."""
    run = make_run(tmp_path / "run")
    before = rows_of(run)
    of_step = [row for row in before if row["step"] == 1000]
    taken = [{**row, "alignment": None} for row in before if row["step"] == 990]
    updates = [{**row, "alignment": 0.5, "weight": 2.0, "domain": "junk"} for row in of_step]
    trained = [{**row, "alignment": None} for row in of_step]
    kinds = {"training": [*taken, *trained], "update": updates}
    rows = [{**row, "source": name} for name, kind in kinds.items() for row in kind]
    table = pa.Table.from_pylist(rows)
    for path in (run / "weights").iterdir():
        path.unlink()
    pq.write_table(table.drop_columns("source") if old else table, run / "weights" / "1.parquet")
    found = read_weights(run)
    assert sorted(found.weight) == pytest.approx(sorted(row["weight"] for row in rows))
    assert mean_weight_by_domain(run, 1) == pytest.approx(mean_by_domain(trained + updates))
    # Both kinds are still counted once where a resumed run wrote the step again.
    pq.write_table(table, run / "weights" / "2.parquet")
    assert len(read_weights(run).weight) == len(rows)


def test_names_tell_runs_apart() -> None:
    assert run_names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert run_names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    with pytest.raises(UserError, match="named twice"):
        run_names([Path("/a/x"), Path("/a/../a/x")])


def test_labels_are_spread_in_order() -> None:
    places = spread(np.array([0.1, 0.5, 0.5, 0.52, 0.9]), 0.1)
    assert (np.diff(places) >= 0.1 - 1e-12).all()
    assert places[0] == pytest.approx(0.1) and places[4] == pytest.approx(0.9)
    assert places[1:4].mean() == pytest.approx((0.5 + 0.5 + 0.52) / 3)
    assert len(spread(np.array([]), 0.1)) == 0


def test_command_writes_both_plots(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    done = report(run, fresh=True)
    assert done.returncode == 0 and done.stderr == ""
    expected = [run / "report" / "weight_by_domain.png", run / "report" / "loss.png"]
    assert done.stdout.split() == [str(path) for path in expected]


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
    bare = make_run(tmp_path / "bare", steps=100)
    shutil.rmtree(bare / "weights")
    broken = make_run(tmp_path / "broken", steps=100)
    (broken / "weights" / "003.parquet").write_bytes(b"PAR1 not really")
    torn = make_run(tmp_path / "torn", steps=100)
    (torn / "metrics.jsonl").write_text('{"step": 1, "phase": "train"}\n{"step"\n')
    cases = [
        ((tmp_path,), "is not a run: it has no metrics.jsonl"),
        ((tmp_path / "gone",), "is not a run"),
        ((run, "--compare", tmp_path), "is not a run"),
        ((bare,), "has no weights in weights/*.parquet"),
        ((broken,), "003.parquet has no weights of a run"),
        ((torn,), "metrics.jsonl line 2 is not JSON"),
        ((run, "--target-domain", "novels"), "--target-domain novels is not a held-out domain"),
    ]
    for arguments, message in cases:
        done = report(*arguments)
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1 and done.stdout == ""
        assert lines[0].startswith("error: ") and message in lines[0]
    assert not list(tmp_path.glob("*/report"))


def test_torch_is_not_imported() -> None:
    program = "import sys, megatron_dwm.report.run_report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)
