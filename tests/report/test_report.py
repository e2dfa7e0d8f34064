"""The report's numbers against plain Python over the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.config.errors import UserError
from megatron_dwm.report.content import Figure
from megatron_dwm.report.curves import MAX_BINS
from megatron_dwm.report.run_files import read_metrics
from megatron_dwm.report.run_report import Request, contents_of, read_runs
from megatron_dwm.report.runs import run_names
from megatron_dwm.report.tables import held_out_loss, mean_weight_by_domain
from megatron_dwm.report.weight_stream import codes, stream, weight_files
from megatron_dwm.report.weight_summary import QUANTILES, summarize


def rows_of(run: Path) -> list[dict]:
    paths = sorted((run / "weights").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def weights_of(run: Path) -> list[float]:
    """The weights that count, sorted."""
    batches = stream(weight_files(run), ["weight"])
    return sorted(value for batch in batches for value in batch["weight"].to_pylist())


def mean_by_domain(rows: list[dict]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["domain"], []).append(row["weight"])
    return {name: sum(values) / len(values) for name, values in groups.items()}


def figures_of(run: Path, *compare: Path) -> dict[str, Figure]:
    contents = contents_of(read_runs(Request(run_dir=run, compare=compare)))
    return {figure.id: figure for content in contents for figure in content.figures}


def rows_where(figure: Figure, **values: object) -> list[dict]:
    rows = [
        dict(zip(figure.data, row, strict=True)) for row in zip(*figure.data.values(), strict=True)
    ]
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


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


def test_weights_are_those_of_the_files(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Means and quantiles of ten bins of ten recorded steps, and means of the five stages."""
    run = make_run(tmp_path / "run")
    rows, files = rows_of(run), weight_files(run)
    summary = summarize(files, 10)
    for number in range(10):
        steps = range(100 * number + 10, 100 * number + 101, 10)
        inside = [row for row in rows if row["step"] in steps]
        found = dict(zip(summary.domains, summary.mean_by_domain()[number], strict=True))
        assert found == pytest.approx(mean_by_domain(inside), rel=1e-6)
        assert summary.step[number] == np.mean(steps)
        weights = [row["weight"] for row in inside]
        # Half a bin of the histogram, and one place in the order of 320 weights.
        exact = np.quantile(weights, QUANTILES, method="inverted_cdf")
        assert summary.quantiles()[number] == pytest.approx(exact, rel=2 ** (1 / 128) - 1)
    for number, stage in enumerate(summary.stages):
        inside = [row for row in rows if row["stage"] == stage]
        found = dict(zip(summary.domains, summary.mean_by_stage()[number], strict=True))
        assert found == pytest.approx(mean_by_domain(inside), rel=1e-6)


def test_documents_count_by_their_tokens(tmp_path: Path) -> None:
    """Ten short pieces of weight 0.1 and a long one of 1.1 are uniform in all."""
    (tmp_path / "weights").mkdir()
    columns = {"step": [1] * 11, "stage": [1] * 11, "sample_id": list(range(11))}
    columns |= {"domain": ["web"] * 11, "tokens": [10] * 10 + [900]}
    columns |= {"weight": [0.1] * 10 + [1.1], "loss": [3.0] * 11, "source": ["training"] * 11}
    pq.write_table(pa.table(columns), tmp_path / "weights" / "1.parquet")
    by_tokens = summarize(weight_files(tmp_path), 10, by_tokens=True)
    by_unit = summarize(weight_files(tmp_path), 10)
    assert by_tokens.mean_by_domain()[0] == pytest.approx([1.0], rel=1e-6)
    assert by_tokens.mean_by_stage()[0] == pytest.approx([1.0], rel=1e-6)
    assert by_tokens.last_sum / by_tokens.last_count == pytest.approx([1.0], rel=1e-6)
    assert by_unit.mean_by_domain()[0] == pytest.approx([2.1 / 11], rel=1e-6)


def test_losses_are_those_of_the_file(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line["loss"] for line in lines if line["phase"] == "train"]
    loss = figures_of(run)["loss"]
    drawn = rows_where(loss, text="training")
    each = 1000 // MAX_BINS
    means = [sum(train[i : i + each]) / each for i in range(0, 1000, each)]
    assert [row["loss"] for row in drawn] == pytest.approx(means, rel=1e-6)
    assert [row["step"] for row in drawn[:2]] == [3, 8]
    assert drawn[0]["tokens"] == 3 * 4096 and drawn[0]["flops"] == 6e12
    assert drawn[0]["time"] == pytest.approx(0.75 / 60)  # minutes: the run took longer than 3
    expected = [line["domain_loss"]["target"] for line in lines if line["phase"] == "evaluation"]
    assert held_out_loss(read_metrics(run))["target"].value.tolist() == expected
    shown = [row["loss"] for row in rows_where(loss, text="held out: target")]
    assert shown == pytest.approx(expected, rel=1e-6)
    assert loss.panel_names[:2] == ["training", "held out: target"]


def test_weights_by_domain_have_a_point_for_each_bin(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    figure = figures_of(run)["weight_by_domain"]
    for name, mean in mean_by_domain([r for r in rows_of(run) if r["step"] > 975]).items():
        last = rows_where(figure, domain=name)[-1]
        # The last of 40 bins over steps 10 to 1000 has three recorded steps.
        assert last["weight"] == pytest.approx(mean, rel=1e-6)
        assert last["step"] == 990 and last["tokens"] == 990 * 4096
    assert figure.marks["step"] == [201, 401, 601, 801]


def test_steps_written_twice_count_once_and_an_unfinished_line_is_left_out(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    metrics, weights = read_metrics(run), weights_of(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 990, "phase": "train", "loss": 9.0}\n{"step": 991, "pha')
    shutil.copy(run / "weights" / "005.parquet", run / "weights" / "006.parquet")
    again = read_metrics(run)
    assert len(again) == len(metrics)
    assert [r["loss"] for r in again if r["step"] == 990 and r["phase"] == "train"] == [9.0]
    assert weights_of(run) == weights
    contents = contents_of(read_runs(Request(run_dir=run)))
    [note] = [n for content in contents for n in content.notes if "unfinished" in n]
    assert note == "run: the last line of metrics.jsonl is unfinished and left out"


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
    assert weights_of(run) == pytest.approx(sorted(row["weight"] for row in rows))
    assert mean_weight_by_domain(run, 1) == pytest.approx(mean_by_domain(trained))
    # Both kinds are still counted once where a resumed run wrote the step again.
    pq.write_table(table, run / "weights" / "2.parquet")
    assert weights_of(run) == pytest.approx(sorted(row["weight"] for row in rows))
    streamed = pa.concat_tables(stream(weight_files(run), ["domain"]))
    names: dict[str, int] = {}
    counts = np.bincount(codes(streamed["domain"], names))
    assert counts[names["junk"]] == sum(row["domain"] == "junk" for row in rows)


def test_names_tell_runs_apart() -> None:
    assert run_names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert run_names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    with pytest.raises(UserError, match="named twice"):
        run_names([Path("/a/x"), Path("/a/../a/x")])
