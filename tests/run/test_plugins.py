"""Whole runs of methods outside the package: the example's, and one that learns from alignments."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest

from megatron_dwm.config.load import load_config
from megatron_dwm.model import resolve_shape
from megatron_dwm.weighting import method_class
from megatron_dwm.weighting.costs import Workload
from tests.forking.client import run_python
from tests.small_runs.command import RESUME, metrics, pretrain, succeed, without_time
from tests.small_runs.fixtures import REPOSITORY, Corpus

EXAMPLE = REPOSITORY / "examples" / "plugin" / "loss_rank.py"
RANK = ["--policy.name", "examples.plugin.loss_rank:LossRank", "--policy.options.strength", "2"]
RECENT = ["--policy.name", "examples.plugin.loss_rank:RecentLossRank"]
RECENT += ["--policy.options.strength", "-2", "--policy.options.window_steps", "3"]
PARITY = ["--policy.name", "tests.run.plugin_methods:Parity"]
FREE = ["--weighting.min_effective_sample_size", "0", "--logging.weights_interval_steps", "1"]
# As in test_policies.py.
LAYOUT_TOLERANCE = 1e-5


def _by_step(run_dir: Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Losses and weights of every step, in the order of the samples."""
    rows = ds.dataset(run_dir / "weights").to_table().to_pylist()
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for step in sorted({row["step"] for row in rows}):
        mine = sorted((row for row in rows if row["step"] == step), key=lambda r: r["sample_id"])
        found[step] = (
            np.array([row["loss"] for row in mine]),
            np.array([row["weight"] for row in mine]),
        )
    return found


def _by_hand(losses: np.ndarray, others: np.ndarray, strength: float) -> np.ndarray:
    """The method's definition, a loop over pairs, in double precision."""
    ranks = [
        sum((other < loss) + 0.5 * (other == loss) for other in others) / len(others)
        for loss in losses
    ]
    powers = np.exp(strength * np.array(ranks))
    return powers / powers.mean()


@pytest.fixture(scope="module")
def ranked(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the method without a state."""
    run_dir = tmp_path_factory.mktemp("ranked") / "run"
    succeed(run_dir, *corpus.arguments(), *RANK, *FREE)
    return run_dir


@pytest.fixture(scope="module")
def recent(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the method with a state."""
    run_dir = tmp_path_factory.mktemp("recent") / "run"
    succeed(run_dir, *corpus.arguments(), *RECENT, *FREE)
    return run_dir


def test_the_example_weighs_by_rank_from_the_first_step(ranked: Path) -> None:
    for losses, weights in _by_step(ranked).values():
        # float32 softmax of ranks that are exact in float32.
        np.testing.assert_allclose(weights, _by_hand(losses, losses, 2.0), rtol=1e-5)


def test_its_state_is_the_losses_of_the_last_steps(recent: Path) -> None:
    steps = _by_step(recent)
    assert (steps[1][1] == 1.0).all()
    for step in range(2, 21):
        seen = np.concatenate([steps[each][0] for each in range(max(1, step - 3), step)])
        losses, weights = steps[step]
        np.testing.assert_allclose(weights, _by_hand(losses, seen, -2.0), rtol=1e-5)


@pytest.mark.parametrize("layout", [[], ["--parallel.tensor", "2"], ["--parallel.pipeline", "2"]])
def test_layouts_train_alike(
    corpus: Corpus, recent: Path, tmp_path: Path, layout: list[str]
) -> None:
    succeed(tmp_path / "run", *corpus.arguments(), *RECENT, *FREE, *layout, processes=2)
    ours, expected = metrics(tmp_path / "run", "train"), metrics(recent, "train")
    assert len(ours) == len(expected) == 20
    for line, other in zip(ours, expected, strict=True):
        assert abs(line["loss"] - other["loss"]) < LAYOUT_TOLERANCE, line["step"]
        if layout:  # two replicas have one micro-batch each, for which no weight has to wait
            assert line["flops"] == other["flops"]


def test_a_runs_configuration_trains_it_again(recent: Path, tmp_path: Path) -> None:
    again = [str(recent / "config.yaml"), "--run.dir", str(tmp_path / "again")]
    done = run_python(["-m", "megatron_dwm.pretrain", *again])
    assert done.returncode == 0, done.stderr
    assert without_time(tmp_path / "again") == without_time(recent)


def test_a_resumed_run_keeps_its_options(corpus: Corpus, recent: Path, tmp_path: Path) -> None:
    shutil.copytree(recent, tmp_path / "run")
    arguments = [*corpus.arguments(), *RECENT, *RESUME, "--training.steps", "22"]
    done = pretrain(tmp_path / "run", *arguments, "--policy.options.window_steps", "4")
    assert done.returncode == 2
    assert "policy.options: the run in" in done.stderr and "'window_steps': 3}, now" in done.stderr
    allowed = ["--run.allow_changed", "policy.options", "--policy.options.window_steps", "4"]
    succeed(tmp_path / "run", *arguments, *FREE[2:], *allowed, *FREE[:2])
    steps = _by_step(tmp_path / "run")
    # The checkpoint remembers three steps; the fourth is remembered from here on.
    seen = np.concatenate([steps[each][0] for each in range(18, 22)])
    np.testing.assert_allclose(steps[22][1], _by_hand(steps[22][0], seen, -2.0), rtol=1e-5)


@pytest.fixture(scope="module")
def parity(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the method that learns; updates ahead of the step, as by default."""
    run_dir = tmp_path_factory.mktemp("parity") / "run"
    succeed(run_dir, *corpus.arguments(), *PARITY, "--weighting.update_on", "ahead")
    return run_dir


def test_a_method_that_learns_is_asked_like_a_built_in_one(corpus: Corpus, parity: Path) -> None:
    ahead = ["--weighting.update_on", "ahead"]
    config = load_config([*corpus.arguments(), *PARITY, *ahead])
    built_in = load_config([*corpus.arguments(), "--policy.name", "domain_mean", *ahead])
    assert config.passages == built_in.passages == 2  # a quarter of the batch, with ahead alone
    assert [line["step"] for line in metrics(parity, "weighting")] == [5, 8, 11, 14, 17]
    shape = resolve_shape(config.model)
    costs = [
        method_class(each).costs(each, shape, Workload(replicas=1, passages=2))
        for each in (config, built_in)
    ]
    assert costs[0] == costs[1]
    train = metrics(parity, "train")
    assert train[4]["weight_std"] == 0.0 < train[5]["weight_std"]


@pytest.mark.parametrize("layout", [[], ["--parallel.pipeline", "2"]])
def test_it_learns_alike_under_other_layouts(
    corpus: Corpus, tmp_path: Path, layout: list[str]
) -> None:
    """Its update reads every alignment, also of other replicas."""
    fresh = [*corpus.arguments(), *PARITY, "--weighting.update_on", "fresh"]
    succeed(tmp_path / "alone", *fresh)
    succeed(tmp_path / "run", *fresh, *layout, processes=2)
    for phase in ("train", "weighting"):
        pairs = zip(
            metrics(tmp_path / "run", phase), metrics(tmp_path / "alone", phase), strict=True
        )
        for line, other in pairs:
            assert abs(line["loss"] - other["loss"]) < LAYOUT_TOLERANCE, (phase, line["step"])


def test_a_state_that_no_checkpoint_takes_is_refused_at_once(
    corpus: Corpus, tmp_path: Path
) -> None:
    name = "tests.run.plugin_methods:Unsaved"
    done = pretrain(tmp_path / "run", *corpus.arguments(), "--policy.name", name)
    assert done.returncode == 2
    assert f"policy {name}: state_dict has a tests.run.plugin_methods.Options at" in done.stderr
    assert "['where'][0]" in done.stderr and not (tmp_path / "run" / "config.yaml").exists()


def test_a_state_that_its_code_cannot_load_is_one_line(corpus: Corpus, tmp_path: Path) -> None:
    name = "tests.run.plugin_methods:Rewritten"
    arguments = [*corpus.arguments(), "--policy.name", name, *RESUME, "--training.steps"]
    succeed(tmp_path / "run", *arguments, "2")
    done = pretrain(tmp_path / "run", *arguments, "3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"the state of policy {name} does not fit its options or code now" in done.stderr
    assert "'float' object has no attribute 'item'" in done.stderr


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_module_in_the_working_directory_is_found(
    corpus: Corpus, tmp_path: Path, ranks: int | None
) -> None:
    """In fresh interpreters, also those that torchrun starts, and by a tool with its own folder."""
    shutil.copy(EXAMPLE, tmp_path / "loss_rank_here.py")
    arguments = [*corpus.arguments(), "--policy.name", "loss_rank_here:LossRank"]
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    run = ["-m", "megatron_dwm.pretrain", *arguments, "--training.steps", "2"]
    done = run_python(run, environment=environment, cwd=tmp_path, ranks=ranks, fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = [str(REPOSITORY / "tools" / "plan.py"), *arguments, "--gpus", "1", "--gpu", "h100-80gb"]
    done = run_python([*plan, "--brief"], environment=environment, cwd=tmp_path, fresh=True)
    assert done.returncode == 0 and "fits" in done.stdout, done.stderr


def test_wrong_weights_are_the_methods(corpus: Corpus, tmp_path: Path) -> None:
    twice = ["--policy.name", "tests.run.plugin_methods:Twice", "--training.steps", "2"]
    done = pretrain(tmp_path / "run", *corpus.arguments(), *twice)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the mean is 2.0; correct tests.run.plugin_methods:Twice.weights" in line


def test_a_changed_file_of_a_method_is_noted(corpus: Corpus, tmp_path: Path) -> None:
    file = tmp_path / "loss_rank_noted.py"
    shutil.copy(EXAMPLE, file)
    arguments = [*corpus.arguments(), "--policy.name", "loss_rank_noted:LossRank"]
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    sums = []
    for steps in (2, 3, 4):
        if steps == 4:
            file.write_text(file.read_text() + "# a remark\n")
        more = ["--run.dir", "run", "--training.steps", str(steps), *RESUME]
        command = ["-m", "megatron_dwm.pretrain", *arguments, *more]
        done = run_python(command, environment=environment, cwd=tmp_path, fresh=True)
        assert done.returncode == 0, done.stderr
        assert ("has changed since the run's last start" in done.stderr) == (steps == 4)
        sums.append(hashlib.sha256(file.read_bytes()).hexdigest())
    lines = map(json.loads, (tmp_path / "run" / "starts.jsonl").read_text().splitlines())
    sources = [line["policy_source"] for line in lines]
    assert sources == [{"file": str(file), "sha256": each} for each in sums]


def test_a_mistake_costs_no_process_group(corpus: Corpus) -> None:
    """The rank that would wait for others is told before it does."""
    arguments = [*corpus.arguments(), "--policy.name", "tests.run.plugin_methods:Missing"]
    command = ["-m", "megatron_dwm.pretrain", *arguments]
    two = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    environment = {**two, "MASTER_PORT": "1", "PYTHONWARNINGS": "ignore"}
    done = run_python(command, environment=environment, limit_s=60.0)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "plugin_methods.py has no Missing" in line
