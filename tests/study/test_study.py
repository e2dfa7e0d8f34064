"""The study: its text, its runs' configurations, its intervals, and a tiny one from end to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from examples.study import texts
from examples.study.contrasts import runs_before
from examples.study.outcome import read_outcome
from examples.study.spec import BASE, Run, Study
from examples.study.study_file import FILE, read_study
from examples.study.workplace import Workplace
from megatron_dwm.config import UserError
from megatron_dwm.config.effect import warnings_of_effect
from megatron_dwm.config.load import load
from megatron_dwm.config.validate import validate_config
from megatron_dwm.model import resolve_shape
from megatron_dwm.model.shape import heads_of
from megatron_dwm.weighting import method_class
from tests.small_runs.fixtures import REPOSITORY

STUDY = read_study()
WORDS = 13  # as tools/make_sample_corpus.py


def _runs(study: Study) -> list[Run]:
    return [run for part in study.parts.values() for run in study.runs(part)]


def test_every_run_comes_after_those_that_it_needs() -> None:
    by_name: dict[str, Run] = {}
    for run in _runs(STUDY):
        made: set[str] = set()
        for each in [*STUDY.needed(run), run]:
            assert set(each.needs) <= made, each.name
            made.add(each.name)
            assert by_name.setdefault(each.name, each) == each
    assert all(BASE in part.methods for part in STUDY.parts.values())


def test_a_run_that_two_need_counts_once() -> None:
    """A method after two, one of which is itself after the other."""
    first, second = (
        replace(STUDY.methods["similarity"], name=name, after=after)
        for name, after in (
            ("first", ("validation_mixing",)),
            ("last", ("validation_mixing", "first")),
        )
    )
    study = replace(STUDY, methods={**STUDY.methods, "first": first, "last": second})
    found = runs_before(study, study.run("0.16M", "junk", "novels", "last", 1))
    assert [run.method.name for run in found.values()] == ["validation_mixing", "first"]


def test_a_run_that_reads_no_target_is_the_same_for_all() -> None:
    names = {STUDY.run("0.16M", "junk", target, BASE, 1).name for target in texts.TARGETS}
    assert names == {"0.16M-junk-novels-uniform-1"}
    for method in ("dwm_ahead", "dsir_half", "excess_loss", "rater_half"):
        found = {STUDY.run("0.16M", "junk", target, method, 1).name for target in texts.TARGETS}
        assert len(found) == len(texts.TARGETS), method


def test_rates_and_lengths_reach_the_run(tmp_path: Path) -> None:
    for method, steps, rate in (
        (BASE, 1000, 3e-3),
        ("uniform_rate_0.7", 1000, 2.1e-3),
        ("uniform_1.25", 1250, 3e-3),
    ):
        run = STUDY.run("0.16M", "junk", "novels", method, 1)
        training = load(_arguments(_place(tmp_path), run), "study").config.training
        assert (training.steps, training.learning_rate) == (steps, pytest.approx(rate))


def test_sizes_have_as_many_tokens_a_parameter(tmp_path: Path) -> None:
    """26, within a few percent; the vocabulary of the last is not that of the study's tokenizer."""
    for name, parameters in {"0.16M": 158_016, "0.6M": 675_712, "2.5M": 2_438_912}.items():
        run = STUDY.run(name, "junk", "novels", BASE, 1)
        config = load(_arguments(_place(tmp_path), run), "study").config
        tokens = run.steps * config.training.global_batch_size * config.data.sequence_length
        assert tokens / parameters == pytest.approx(26, rel=0.02)


@pytest.mark.parametrize(
    "run", {run.name: run for run in _runs(STUDY) if run.seed == 1}.values(), ids=lambda r: r.name
)
def test_options_are_keys_of_a_run(run: Run, tmp_path: Path) -> None:
    """No key is unknown, out of its bounds, without effect, or at odds with another."""
    place = _place(tmp_path)
    for needed in run.needs:
        for folder in ("checkpoints/step_00000001", "weighting/stage_1"):
            (place.folder / "runs" / needed / folder).mkdir(parents=True, exist_ok=True)
    loaded = load(_arguments(place, run), "study")
    config = loaded.config
    validate_config(config, heads_of(resolve_shape(config.model, 1024)), 1)
    warnings_of_effect(config, loaded.given, method_class(config).parts(config))


def _place(folder: Path) -> Workplace:
    return Workplace(folder=folder, study=STUDY)


def _arguments(place: Workplace, run: Run) -> list[str]:
    """The arguments of the run's command."""
    command = place.command(run, place.folder / "data")
    return command[command.index("megatron_dwm.pretrain") + 1 :]


def test_no_set_contains_another(tmp_path: Path) -> None:
    """No run of 13 words is in two of training text, targets and held-out text."""
    texts.write_training_text(tmp_path / "text.jsonl")
    texts.write_held_out(tmp_path / "heldout.jsonl")
    seen = set().union(*map(_grams, _texts(tmp_path / "text.jsonl")))
    targets: set[int] = set()
    for target in texts.TARGETS:
        texts.write_target(target, tmp_path / f"{target}.jsonl")
        found = _texts(tmp_path / f"{target}.jsonl")
        assert len(found) > 30
        targets |= set().union(*map(_grams, found))
    assert not seen & targets
    seen |= targets
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert {"mansfield_park", "sense_and_sensibility"} < {row["domain"] for row in rows}
    shared = [row["domain"] for row in rows if _grams(row["text"]) & seen]
    assert shared == []


def _texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def _grams(text: str) -> set[int]:
    words = text.lower().split()
    return {hash(tuple(words[i : i + WORDS])) for i in range(len(words) - WORDS + 1)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A study of three methods, one of which needs the run of another."""
    found = yaml.safe_load(FILE.read_text())
    found["sizes"] = {"0.16M": {"steps": 60, "learning_rate": 3e-3}}
    found["parts"] = {
        "small": {
            **{"about": "a try", "default": True, "sizes": ["0.16M"], "corpora": ["natural"]},
            **{"targets": ["novels"], "seeds": [1], "methods": [BASE, "excess_loss", "dwm_ahead"]},
        }
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(found))
    return file


def _study(small: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "examples.study", str(small.parent / "work")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [*command, "--study", str(small), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_small_study_is_killed_and_goes_on(small: Path) -> None:
    work = small.parent / "work"
    first = _study(small, "--jobs", "2")
    runs = work / "runs"
    limit = time.monotonic() + 200
    while not list(runs.glob("*/metrics.jsonl")) and time.monotonic() < limit:
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = _study(small, "--jobs", "2")
    out, err = second.communicate(timeout=400)
    assert second.returncode == 0, err
    document = (work / "study.md").read_text()
    for name in (BASE, "excess_loss", "dwm_ahead"):
        assert f"| `{name}` | 1 |" in document
    ours, theirs = (
        read_outcome(runs / f"0.16M-natural-novels-{name}-1", "", "").last_losses()[
            "mansfield_park"
        ]
        for name in ("dwm_ahead", BASE)
    )
    assert f"{ours - theirs:+.3f}" in document and f"{theirs:.3f}" in document
    shutil.rmtree(runs)
    (work / "study.md").unlink()
    page_alone = _study(small, "--no-training")
    page_alone.communicate(timeout=100)
    assert page_alone.returncode == 0 and (work / "study.md").read_text() == document
    third = _study(small, "--jobs", "2")
    out, err = third.communicate(timeout=100)
    assert third.returncode == 0 and "(1 of" not in out, "nothing is trained twice"
    assert (work / "study.md").read_text() == document, "the outcomes outlive the runs"
    lines = (work / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["run"].split("-")[3] for line in lines].count("excess_loss") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part", "none"], "--part none: no such part; expected one of small"),
        (["--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["--scale", "nan"], "--scale nan: expected a number above 0"),
        (["--scale", "-1"], "--scale -1.0: expected a number above 0"),
        (["--output", "nowhere/study.md"], "nowhere is no folder that can be written to"),
        (["--output", "README.md"], "README.md was not written by a study"),
        (["--results", "docs"], "--results docs: is a folder"),
        (["--results", "README.md"], "README.md line 1: no outcome of a run"),
        (["--gpus", "99"], "--gpus 99: this machine has "),
        (["--full"], "part full"),
        (["--no-training", "--gpus", "1"], "--gpus: has no effect with --no-training"),
        (["--no-training", "--jobs", "1"], "--jobs: has no effect with --no-training"),
        (["--no-training", "--part", "small"], "--part: has no effect with --no-training"),
        (["--list", "--jobs", "1"], "--jobs: has no effect with --list"),
        (["--gpus", "4", "--jobs", "3"], "--jobs 3: expected 4 or more, one for each of --gpus 4"),
        (["--list", "--output", "x.md"], "--output: has no effect with --list"),
        (["--no-training", "--full"], "--full: has no effect with --no-training"),
        (["--no-training", "--gpu", "h100-80gb"], "--gpu: has no effect with --no-training"),
        (["--gpu", "2"], "--gpus N trains on GPUs"),
        (["--list", "--gpu", "2"], "--gpu 2: expected one of"),
        (["--no-training"], "results.jsonl has no outcome of this study's runs"),
        (["--study", "examples/tiny.yaml"], "expected sizes, methods and parts"),
    ],
)
def test_mistakes_are_one_line(small: Path, arguments: list[str], words: str) -> None:
    job = _study(small, *arguments)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 2
    [line] = err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not out, "a mistake is found before anything is printed"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("sizes.0.16M.learning_rate", "3e-3", "learning_rate: expected a number above 0 (YAML"),
        ("sizes.0.16M.steps", -5, "steps: expected a whole number above 0, got -5"),
        ("sizes.0.16M", None, "size 0.16M: expected its fields"),
        ("methods.uniform.stepz", 2, "method uniform: unknown field stepz; expected one of"),
        ("methods.uniform.after", ["nope"], "method uniform: after: no run nope"),
        ("methods.uniform.domains", "web", "domains: expected a list of names, got 'web'"),
        ("methods.uniform.options", "--x '", "method uniform: options: No closing quotation"),
        ("methods.uniform.select", "best", "select: expected one of random, dsir, rater"),
        ("methods", [], "expected sizes, methods and parts"),
        ("parts.small.corpora", ["jnuk"], "part small: no corpus jnuk; expected one of natural"),
        ("parts.small.methods", ["dwm_ahead"], "part small: has no method uniform"),
        ("parts.small.seeds", "12", "seeds: expected a list of whole numbers above 0"),
        ("parts.small.default", False, "no part of this study has default: true"),
        ("parts.small.targets", ["mine"], "target.mine.jsonl"),
    ],
)
def test_mistakes_in_a_study_are_one_line(
    small: Path, path: str, value: object, words: str, tmp_path: Path
) -> None:
    found = yaml.safe_load(small.read_text())
    *before, last = path.replace("0.16M", "0_16M").split(".")
    place = found
    for key in before:
        place = place[key.replace("_16M", ".16M")]
    place[last.replace("_16M", ".16M")] = value
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(found))
    with pytest.raises(UserError) as caught:
        study = read_study(file)
        study.chosen([])
        work = Workplace(folder=tmp_path / "work", study=study)
        work.prepare()
        for run in _runs(study):
            work.settings(run)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.jsonl", "", "text.jsonl: has no record"),
        (
            "text.jsonl",
            '{"text": "a"}\n',
            "text.jsonl line 1: expected a record with a text `domain`",
        ),
        (
            "text.jsonl",
            '\n{"text": 1, "domain": "a"}\n',
            "line 2: expected a record with a text `text`",
        ),
        ("heldout.jsonl", "[1, 2]\n", "heldout.jsonl line 1: expected a record"),
        ("target.novels.jsonl", '{"text": "a"}\n{"te', "target.novels.jsonl line 2: is not JSON"),
        ("tokenizer.model", "none", "tokenizer.model: is no SentencePiece model"),
    ],
)
def test_mistakes_in_own_text_are_one_line(
    name: str, content: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        _place(tmp_path).prepare()
    assert words in str(caught.value)
    assert (tmp_path / name).read_text() == content


def test_sigterm_stops_runs_and_study(small: Path) -> None:
    """The runs write a checkpoint and end; the next call goes on from it."""
    job = _study(small)
    runs = small.parent / "work" / "runs"
    limit = time.monotonic() + 200
    while not list(runs.glob("*/metrics.jsonl")) and time.monotonic() < limit:
        time.sleep(0.2)
    job.terminate()
    job.communicate(timeout=100)
    assert job.returncode == 128 + signal.SIGTERM
    logs = [file.read_text() for file in runs.glob("*.log")]
    assert any("(SIGTERM); continue with" in log for log in logs)
    assert not (small.parent / "work" / "results.jsonl").exists()
