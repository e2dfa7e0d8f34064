"""Targets with fewer rows than a validation batch, and what is said of a target at the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.launch import run_ranks
from tests.run.target_workers import Halves
from tests.small_runs.command import RESUME, metrics, without_time
from tests.small_runs.fixtures import CORPUS, Corpus
from tests.small_runs.forked import Server

# Sums in another order are 1e-7 apart; ten steps of Adam at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-5
# Alignments divide by the root of Adam's second moment, which multiplies it once more (1.4e-5 was
# seen). Other passages, or other halves, change them by the noise that is measured: by a tenth.
ALIGNMENT_TOLERANCE = 1e-3
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
            relative = ALIGNMENT_TOLERANCE if key.startswith("alignment") else 0.0
            near = pytest.approx(other[key], abs=LAYOUT_TOLERANCE, rel=relative)
            assert line[key] == near, key


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
    assert text.count("(validation.path) once: 7, not the 8 of training.global_batch_size") == 1
    assert all("alignment_agreement" in line for line in metrics(run_dir, "weighting"))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 50])
def test_halves_are_the_even_and_the_odd_rows_of_the_global_batch(
    corpus: Corpus, tmp_path: Path, rows: int
) -> None:
    """Every row once, whatever the replicas hold; 8 passages are asked for."""
    path = target(tmp_path, rows)[1]
    given = {"target": path, "tokenizer": corpus.tokenizer}
    interleaved = {"pipeline": 2, "virtual_stages": 2, "layers": 4}
    cases = [{"micro_batch": size} for size in (1, 2, 4)]
    found: list[Halves] = []
    for world_size, layouts in ((1, [{}]), (2, [{}, interleaved]), (4, [{}, interleaved])):
        these = [{**given, **case, **layout} for layout in layouts for case in cases]
        results = run_ranks("tests.run.target_workers:halves", world_size, these)
        found += [rank for ranks in results for rank in ranks]
    for batches in found:
        for whole, even, odd in batches:
            assert len(set(whole)) == len(whole) == min(rows, 8)
            assert even == whole[0::2] and odd == whole[1::2]
    assert all(batches == found[0] for batches in found)


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
    assert not any(
        "not measured" in job.text or "(validation.path) once" in job.text for job in jobs
    )
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
    apart = [*corpus.held_out(), "--evaluation.interval_steps", "9"]
    job = server.succeed(tmp_path / "unroll", [*arguments, *apart, *unroll])
    assert "are also in" not in job.text
    assert job.text.count("not measured: bilevel.estimator unroll gives no alignments") == 1


def test_a_step_that_a_cpu_cannot_finish_is_said_before_it() -> None:
    """A line where the run was silent; 6e13 FLOPs are a minute of a fast CPU."""
    [[[short]], [[long]]] = [
        [run_ranks("tests.run.target_workers:said_of_a_step", 1, [{"flops": flops}])[0]]
        for flops in (5e13, 6e14)
    ]
    assert short == []
    assert len(long) == 1 and "10 minutes" in long[0] and "lower data.sequence_length" in long[0]


def test_passages_that_are_trained_on_many_times_are_said(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """Two rows, two of them in a batch of eight: twenty steps read each twenty times."""
    target(tmp_path, 2)
    file = tmp_path / "target.jsonl"
    mixing = [*corpus.arguments(), "--policy.name", "validation_mixing"]
    mixing += ["--policy.mix_fraction", "0.25", "--validation.path", str(file)]
    mixing += ["--validation.loss_on", "last_word"]
    most, many, few = (
        server.succeed(tmp_path / steps, [*mixing, "--training.steps", steps]).text
        for steps in ("40", "20", "19")
    )
    said = f"each of the 2 rows of {file} (validation.path) 20 times in 20 steps"
    assert many.count(said) == 1 and "each of the 2 rows" not in few
    assert "lower policy.mix_fraction to 0.125," in many, (
        "one row in a batch of eight: ten readings"
    )
    assert "; add passages, or" in most, "one row in a batch would be read twenty times"
