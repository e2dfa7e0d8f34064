"""Targets with fewer rows than a validation batch, and what is said of a target at the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import CORPUS, Corpus
from tests.training.forked import Server
from tests.training.runs import RESUME, metrics, without_time

# Sums in another order are 1e-7 apart; ten steps of Adam at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-5
INTERLEAVED = ["--parallel.pipeline", "2", "--parallel.virtual_stages", "2"]


def target(folder: Path, rows: int) -> list[str]:
    """Options of a run whose target has so many rows, a passage each; noise is always measured."""
    lines = (CORPUS / "validation.jsonl").read_text().splitlines()[:rows]
    (folder / "target.jsonl").write_text("".join(line + "\n" for line in lines))
    return [
        *("--validation.path", str(folder / "target.jsonl")),
        *("--validation.loss_on", "last_word", "--bilevel.noise_interval_updates", "1"),
        *("--policy.name", "dwm", "--training.steps", "10"),
    ]


def close(found: list[dict[str, Any]], expected: list[dict[str, Any]], *keys: str) -> None:
    assert len(found) == len(expected) > 0
    for line, other in zip(found, expected, strict=True):
        for key in keys:
            assert line[key] == pytest.approx(other[key], abs=LAYOUT_TOLERANCE), key


@pytest.fixture(scope="module")
def seven(
    server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], str]:
    """(finished run on a target of seven rows, its arguments, what it said)."""
    folder = tmp_path_factory.mktemp("seven")
    arguments = [*corpus.arguments(), *target(folder, 7), "--model.num_layers", "4"]
    arguments += ["--training.checkpoint_interval_steps", "6"]
    job = server.succeed(folder / "run", arguments)
    return folder / "run", arguments, job.text


def test_a_small_target_makes_a_small_batch_and_a_line(seven: tuple[Path, list[str], str]) -> None:
    run_dir, _, text = seven
    assert text.count("has 7 rows: a validation batch has 7 passages, not the 8 of training") == 1
    for line in metrics(run_dir, "weighting"):
        # Halves that shared rows agreed at 0.9 and more, whatever the target.
        assert line["alignment_agreement"] < 0.9


@pytest.mark.parametrize("layout", [[], INTERLEAVED], ids=str)
def test_layouts_read_the_same_passages_in_the_same_halves(
    server: Server, seven: tuple[Path, list[str], str], tmp_path: Path, layout: list[str]
) -> None:
    """Seven passages on two replicas: four and three, in halves of two and two, two and one."""
    alone, arguments, _ = seven
    server.succeed(tmp_path / "run", [*arguments, *layout], ranks=2)
    found, expected = (metrics(folder, "weighting") for folder in (tmp_path / "run", alone))
    close(found, expected, "val_loss", "alignment_mean", "alignment_std", "loss")
    # A correlation of eight alignments that are 1e-3 small is less exact than they are.
    for line, other in zip(found, expected, strict=True):
        difference = line["alignment_agreement"] - other["alignment_agreement"]
        assert abs(difference) < 1e-2


def test_a_small_target_resumes_bit_for_bit(
    server: Server, seven: tuple[Path, list[str], str], tmp_path: Path
) -> None:
    alone, arguments, _ = seven
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    server.succeed(tmp_path / "run", [*arguments, *RESUME])
    assert without_time(tmp_path / "run") == without_time(alone)


def test_one_row_trains_and_says_that_noise_is_not_measured(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """Two replicas, one of which has a row without loss; the row against itself gave 2e12."""
    arguments = [*corpus.arguments(), *target(tmp_path, 1)]
    runs = [tmp_path / "one", tmp_path / "two"]
    jobs = [server.succeed(folder, arguments, ranks=n) for n, folder in enumerate(runs, start=1)]
    for job, folder in zip(jobs, runs, strict=True):
        assert job.text.count("signal-to-noise is not measured: it is measured between halves") == 1
        for line in metrics(folder, "weighting"):
            assert "alignment_signal_to_noise" not in line and line["alignment_std"] > 0.0
    close(*(metrics(folder, "weighting") for folder in runs), "val_loss", "alignment_std")
    damped = server.run(tmp_path / "damped", [*arguments, "--weighting.damp_by_noise", "true"])
    assert damped.codes == [2] and "has one row" in damped.text
    assert len(damped.text.splitlines()) == 1 and "Traceback" not in damped.text


def test_noise_is_measured_where_replicas_have_an_odd_number_of_passages(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """Six passages: three on each of two replicas, in halves by the global batch's row numbers."""
    arguments = [*corpus.arguments(), *target(tmp_path, 50), "--validation.batch_size", "6"]
    runs = [tmp_path / "one", tmp_path / "two"]
    jobs = [server.succeed(folder, arguments, ranks=n) for n, folder in enumerate(runs, start=1)]
    assert not any("not measured" in job.text or "rows:" in job.text for job in jobs)
    close(*(metrics(folder, "weighting") for folder in runs), "val_loss", "alignment_std")
    agreements = [
        [line["alignment_agreement"] for line in metrics(folder, "weighting")] for folder in runs
    ]
    assert agreements[0] == pytest.approx(agreements[1], abs=1e-2)


def test_shared_passages_and_what_measures_no_noise_are_named(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    lines = (CORPUS / "heldout.jsonl").read_text().splitlines()
    own = [json.loads(line) for line in (CORPUS / "validation.jsonl").read_text().splitlines()[:3]]
    more = [json.dumps({"text": f" {line['text']}\n", "domain": "target"}) for line in own]
    (tmp_path / "held.jsonl").write_text("".join(line + "\n" for line in [*lines[:9], *more]))
    arguments = [*corpus.arguments(), "--policy.name", "dwm", "--training.steps", "2"]
    arguments += ["--evaluation.path", str(tmp_path / "held.jsonl")]
    job = server.succeed(tmp_path / "run", [*arguments, "--training.steps", "6"])
    assert job.text.count("3 of the 12 passages of") == 1 and "is not held out" in job.text
    unroll = ["--bilevel.estimator", "unroll", "--training.steps", "6"]
    apart = ["--evaluation.path", str(CORPUS / "heldout.jsonl"), "--evaluation.interval_steps", "9"]
    job = server.succeed(tmp_path / "unroll", [*arguments, *apart, *unroll])
    assert "stand in" not in job.text
    assert job.text.count("not measured: bilevel.estimator unroll gives no alignments") == 1
