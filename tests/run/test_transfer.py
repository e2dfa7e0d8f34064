"""A weighting model that another run learned: stage by stage, to a larger LLM and selected data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.forking.client import run_python
from tests.launch import run_ranks
from tests.run.test_pools import kept
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same, saved_step

BATCH, STAGES, STEPS = 8, 3, 9
OWN = ["--policy.name", "dwm", "--weighting.encoder", "own"]
LARGER = ["--model.hidden_size", "128", "--model.num_layers", "4"]
# fp32 against double precision, in logits of the order of 1.
TOLERANCE = 1e-4
# Sums in another order are 1e-7 apart; some steps of Adam at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def source(server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages with a tiny LLM; two updates before the second and the third."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    staged = ["--weighting.mode", "staged", "--weighting.stages", str(STAGES)]
    staged += ["--weighting.updates_per_stage", "2", "--weighting.learning_rate", "0.05"]
    server.succeed(run_dir, [*corpus.arguments(), *OWN, *staged, "--training.steps", "6"])
    return run_dir


@pytest.fixture(scope="module")
def selected(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a larger LLM on a part of the documents, chosen by the project's own tool."""
    prefix = tmp_path_factory.mktemp("selected") / "part"
    select = ["tools/select_data.py", "random", "--input", corpus.prefix]
    select += ["--output-prefix", str(prefix), "--tokens", "20000", "--domain-key", "domain"]
    done = run_python(select)
    assert done.returncode == 0, done.stderr
    options = ["--training.steps", str(STEPS), "--logging.weights_interval_steps", "1"]
    options += ["--weighting.min_effective_sample_size", "0", "--weighting.frozen", "true"]
    return [*corpus.arguments(), "--data.train", str(prefix), *OWN, *LARGER, *options]


@pytest.fixture(scope="module")
def whole(
    server: Server, source: Path, selected: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run that takes the models stage by stage."""
    run_dir = tmp_path_factory.mktemp("transfer") / "run"
    save = ["--training.checkpoint_interval_steps", "2"]
    server.succeed(run_dir, [*selected, *save, "--weighting.load", str(source)])
    return run_dir


def test_each_third_of_the_run_has_the_model_of_that_third(whole: Path, source: Path) -> None:
    found = kept(whole)
    steps = range(1, STEPS + 1)
    stages = {step: 1 + (step - 1) // 3 for step in steps}
    assert [line["stage"] for line in metrics(whole, "train")] == list(stages.values())
    cases = [
        {
            "run_dir": str(whole),
            "step": step - 1,
            "model": str(source / f"weighting/stage_{stages[step]}"),
            "samples": [number for number, _ in found[step]],
        }
        for step in steps
    ]
    worker = "tests.weighting.pool_workers:pool_logits"
    for step, [by_hand] in zip(steps, run_ranks(worker, 1, cases), strict=True):
        weights = torch.tensor([weight for _, weight in found[step]], dtype=torch.float64)
        expected = BATCH * torch.softmax(by_hand["logits"], dim=0)
        torch.testing.assert_close(weights, expected, rtol=TOLERANCE, atol=0)
        # The first model has not learned; the others are far enough from it, and from each other.
        assert (float(weights.std()) == 0.0) == (step <= 3)
        assert step <= 3 or float(weights.std()) > 0.01


def test_the_run_keeps_the_models_that_it_used(whole: Path, source: Path) -> None:
    for number in range(1, STAGES + 1):
        file = Path(f"weighting/stage_{number}/weighting.safetensors")
        ours, theirs = load_file(whole / file), load_file(source / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_folder_and_the_run_are_the_same_and_the_last_model_is_another(
    server: Server, source: Path, selected: list[str], whole: Path, tmp_path: Path
) -> None:
    load = ["--training.checkpoint_interval_steps", "2", "--weighting.load"]
    server.succeed(tmp_path / "folder", [*selected, *load, str(source / "weighting")])
    assert_same(tmp_path / "folder", whole)
    server.succeed(tmp_path / "last", [*selected, *load, str(source / "weighting/stage_3")])
    lines = metrics(tmp_path / "last", "train")
    assert {line["stage"] for line in lines} == {1} and lines[0]["weight_std"] > 0.01
    # The learning rate of a run of nine steps, and the batches, are the same.
    assert kept(tmp_path / "last")[8] == kept(whole)[8]


@pytest.mark.parametrize("layout", [["--parallel.pipeline", "2"], ["--parallel.tensor", "2"]])
def test_layouts_change_models_at_the_same_steps(
    server: Server,
    source: Path,
    selected: list[str],
    whole: Path,
    tmp_path: Path,
    layout: list[str],
) -> None:
    load = ["--weighting.load", str(source)]
    server.succeed(tmp_path / "run", [*selected, *load, *layout], ranks=2)
    ours, expected = (metrics(run, "train") for run in (tmp_path / "run", whole))
    for line, other in zip(ours, expected, strict=True):
        for key in ("loss", "weight_std"):
            assert line[key] == pytest.approx(other[key], abs=LAYOUT_TOLERANCE)
    file = "weighting/stage_2/weighting.safetensors"
    ours, theirs = (load_file(run / file) for run in (tmp_path / "run", source))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "the rank that writes"


@pytest.mark.parametrize("call", [6, 8])
def test_a_killed_run_goes_on_bit_for_bit(
    server: Server, source: Path, selected: list[str], whole: Path, tmp_path: Path, call: int
) -> None:
    """From a checkpoint inside the second stage, and from the last step of it."""
    save = ["--training.checkpoint_interval_steps", "2"]
    arguments = [*selected, *save, "--weighting.load", str(source)]
    kill = {"name": "send_signal", "place": "training", "call": call, "number": 9, "rank": 0}
    server.run(tmp_path / "run", arguments, fault=kill)
    assert saved_step(tmp_path / "run") == {6: 4, 8: 6}[call]
    server.succeed(tmp_path / "run", [*arguments, *RESUME])
    assert_same(tmp_path / "run", whole)
    assert kept(tmp_path / "run") == kept(whole)


def test_changed_files_are_refused_and_can_be_allowed(
    server: Server, source: Path, selected: list[str], tmp_path: Path
) -> None:
    models, run_dir = tmp_path / "models", tmp_path / "run"
    shutil.copytree(source / "weighting", models)
    arguments = [*selected, "--weighting.load", str(models)]
    first = ["--training.steps", "4"]
    server.succeed(run_dir, [*arguments, *first])
    tensors = load_file(models / "stage_3/weighting.safetensors")
    tensors["head.bias"] += 1.0
    save_file(tensors, models / "stage_3/weighting.safetensors")
    job = server.run(run_dir, [*arguments, *RESUME])
    assert job.codes == [2] and "error: weighting.load: the content has changed" in job.text
    server.succeed(run_dir, [*arguments, *RESUME, "--run.allow_changed", "weighting.load"])


def _unfinished(folder: Path) -> None:
    shutil.rmtree(folder / "weighting/stage_3")


def _with_a_gap(folder: Path) -> None:
    shutil.rmtree(folder / "weighting/stage_2")


def _of_another_tokenizer(folder: Path) -> None:
    file = folder / "weighting/stage_3/weighting.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_sha256": "0" * 64}))


def _of_another_size(folder: Path) -> None:
    file = folder / "weighting/stage_3/weighting.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_size": 8}))


def _as_it_is(folder: Path) -> None:
    assert folder.is_dir()


MISTAKES: list[tuple[Callable[[Path], None], list[str], str]] = [
    (_unfinished, [], "has the models of 2 stages, and its run has 3"),
    (_with_a_gap, [], "has the models of stages 1, 3; expected all from stage_1 on"),
    (_of_another_tokenizer, [], "was trained with tokenizer 000000000000, the run's"),
    (_of_another_size, [], "has other sizes or another tokenizer than"),
    (_as_it_is, ["--weighting.frozen", "false"], "only a frozen model follows"),
    (_as_it_is, ["--training.steps", "2"], "expected at most training.steps, which is 2"),
]


def _name_of(value: object) -> str:
    """A case's name, the same in every pytest worker."""
    return getattr(value, "__name__", str(value)[:30])


@pytest.mark.parametrize(("change", "options", "said"), MISTAKES, ids=_name_of)
def test_mistakes_are_one_line(
    server: Server,
    source: Path,
    selected: list[str],
    tmp_path: Path,
    change: Callable[[Path], None],
    options: list[str],
    said: str,
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source / "weighting", folder / "weighting")
    shutil.copy(source / "config.yaml", folder / "config.yaml")
    change(folder)
    job = server.run(tmp_path / "run", [*selected, "--weighting.load", str(folder), *options])
    assert job.codes == [2], job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: weighting.load: ") and said in line


def test_the_llms_features_are_those_of_one_width(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    llm = ["--policy.name", "dwm", "--weighting.encoder", "llm", "--training.steps", "1"]
    server.succeed(tmp_path / "run", [*corpus.arguments(), *llm])
    load = ["--weighting.load", str(tmp_path / "run"), "--weighting.frozen", "true"]
    job = server.run(tmp_path / "larger", [*corpus.arguments(), *llm, *load, *LARGER])
    assert job.codes == [2], job.text
    assert "reads features of an LLM of width 64, the run's LLM has 128" in job.text
