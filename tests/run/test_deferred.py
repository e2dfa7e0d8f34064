"""Whole runs whose weights over the global batch are divided after the pass."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds
import pytest

from megatron_dwm.config.load import load_config
from megatron_dwm.model import resolve_shape
from megatron_dwm.planning.cost import cost_of
from megatron_dwm.weighting.costs import Workload
from tests.run.test_flops import FORWARD, VOCAB_SIZE
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same

# Sums in another order are 1e-7 apart; 20 steps of Adam at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-5
ALONE = ["--policy.name", "dwm", "--weighting.encoder", "llm"]
ALONE += ["--weighting.across_samples", "false", "--weighting.learning_rate", "0.02"]
DEFERRED = [*ALONE, "--weighting.update_on", "training", "--training.micro_batch_size", "1"]
FIRST = [*DEFERRED, "--weighting.normalizer", "first"]
FRESH = [*ALONE, "--weighting.update_on", "fresh", "--weighting.uniform_floor", "0.2"]
AHEAD = [*ALONE, "--weighting.update_on", "ahead", "--validation.batch_size", "3"]
AHEAD += ["--weighting.probe_fraction", "1"]  # half are others with other numbers of replicas
DOCUMENTS = [*DEFERRED, "--weighting.unit", "document", "--data.mask_documents", "true"]
SIMILARITY = ["--policy.name", "similarity", "--policy.similarity_temperature", "0.02"]
SIMILARITY += ["--training.micro_batch_size", "1"]
LOSSES = ["--policy.name", "loss_reweighting", "--training.micro_batch_size", "2"]
OUTSIDE = ["--policy.name", "tests.run.plugin_methods:Louder", "--training.micro_batch_size", "1"]
RULES = {"similarity": SIMILARITY, "losses": LOSSES, "outside": OUTSIDE}
RUNS = {"training": DEFERRED, "fresh": FRESH, "ahead": AHEAD, "documents": DOCUMENTS, **RULES}
SAVE = ["--training.checkpoint_interval_steps", "3"]


@pytest.fixture(scope="module")
def alone(server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A finished run of one process of each kind."""
    folder = tmp_path_factory.mktemp("alone")
    for name, arguments in RUNS.items():
        server.succeed(folder / name, [*corpus.arguments(), *arguments, *SAVE])
    return {name: folder / name for name in RUNS}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("training", ["--parallel.pipeline", "2"]),
        ("training", ["--parallel.sharded_optimizer", "true"]),
        ("fresh", ["--parallel.tensor", "2", "--parallel.sequence", "true"]),
        ("ahead", []),
        ("ahead", ["--parallel.pipeline", "2"]),
        ("documents", []),
        ("documents", ["--parallel.pipeline", "2"]),
        ("documents", ["--parallel.context", "2"]),
        ("similarity", []),
        ("similarity", ["--parallel.pipeline", "2"]),
        ("losses", ["--parallel.tensor", "2"]),
        ("losses", ["--parallel.sharded_optimizer", "true"]),
    ],
    ids=str,
)
def test_layouts_train_alike(
    server: Server, corpus: Corpus, alone: dict, tmp_path: Path, name: str, layout: list[str]
) -> None:
    server.succeed(tmp_path / "run", [*corpus.arguments(), *RUNS[name], *layout], ranks=2)
    for phase in ("train", "weighting"):
        ours, expected = metrics(tmp_path / "run", phase), metrics(alone[name], phase)
        assert len(ours) == len(expected) >= (phase == "train" or name != "losses")
        for line, other in zip(ours, expected, strict=True):
            for key in {"loss", "val_loss", "weight_std"} & set(line):
                assert abs(line[key] - other[key]) < 10 * LAYOUT_TOLERANCE, (phase, line["step"])


def test_weights_have_mean_one_and_the_drift_is_logged(alone: dict) -> None:
    for name, run_dir in alone.items():
        train = metrics(run_dir, "train")
        for line in train:
            assert line["weight_mean"] == pytest.approx(1.0, abs=1e-5), (name, line["step"])
        weighed = [line for line in train if "weight_temperature" in line]
        assert len(weighed) >= 14 and max(line["weight_std"] for line in weighed) > 0.05
        for line in weighed:
            assert line["weight_temperature"] >= 1.0
            assert abs(line["weight_effective_sample_size_drift"]) < 0.5
    rows = ds.dataset(alone["training"] / "weights").to_table().to_pylist()
    last = [row["weight"] for row in rows if row["step"] == 20]
    assert sum(last) == pytest.approx(8.0, abs=1e-4)


def test_nothing_is_read_first(corpus: Corpus, alone: dict) -> None:
    """Against `normalizer first`, which reads a batch of several micro-batches once more."""
    flops = [line["flops"] for line in metrics(alone["training"], "train")]
    assert flops[6] - flops[5] == pytest.approx(3 * FORWARD, rel=1e-3)
    shape = resolve_shape(load_config([*corpus.arguments(), *DEFERRED]).model, VOCAB_SIZE)
    for arguments, more in ((DEFERRED, 0), (FIRST, 15)):
        config = load_config([*corpus.arguments(), *arguments])
        cost = cost_of(config, shape, Workload(replicas=1))
        assert 20 * cost.reading == pytest.approx(more * FORWARD)
        if not more:
            assert 20 * (cost.llm + cost.weighting) == pytest.approx(flops[-1], rel=1e-9)


def test_reading_first_gives_nearly_the_same_run(
    server: Server, corpus: Corpus, alone: dict, tmp_path: Path
) -> None:
    """The same up to the temperature, which is the step before's."""
    server.succeed(tmp_path / "first", [*corpus.arguments(), *FIRST])
    first, deferred = (metrics(each, "train") for each in (tmp_path / "first", alone["training"]))
    assert [line["loss"] for line in first[:6]] == [line["loss"] for line in deferred[:6]]
    assert first[-1]["loss"] == pytest.approx(deferred[-1]["loss"], abs=0.02)
    assert first[-1]["loss"] != deferred[-1]["loss"]


@pytest.mark.parametrize(
    ("name", "first_weighed"), [("similarity", 6), ("losses", 2), ("outside", 1)]
)
def test_rules_divide_after_the_pass_at_no_cost(
    server: Server, corpus: Corpus, tmp_path: Path, name: str, first_weighed: int
) -> None:
    """Without a bound the temperature is 1 in every step, so both ways give the same weights."""
    arguments = [*corpus.arguments(), *RULES[name], "--weighting.min_effective_sample_size", "0"]
    flops = {}
    for way, read in (("deferred", 1), ("first", 21 - first_weighed)):
        run = [*arguments, "--weighting.normalizer", way]
        server.succeed(tmp_path / way, run)
        config = load_config(run)
        shape = resolve_shape(config.model, VOCAB_SIZE)
        cost = cost_of(config, shape, Workload(replicas=1))
        assert 20 * cost.reading == pytest.approx(read * FORWARD)
        flops[way] = metrics(tmp_path / way, "train")[-1]["flops"]
        assert 20 * (cost.llm + cost.weighting) == pytest.approx(flops[way], rel=1e-9)
    # The first batch with weights is read first in both.
    assert flops["first"] - flops["deferred"] == (20 - first_weighed) * FORWARD
    ours, expected = (metrics(tmp_path / way, "train") for way in ("deferred", "first"))
    assert max(line["weight_std"] for line in ours) > 0.1
    for line, other in zip(ours, expected, strict=True):
        for key in ("loss", "weighted_loss", "weight_std", "grad_norm"):
            assert abs(line[key] - other[key]) < 10 * LAYOUT_TOLERANCE, (key, line["step"])


def test_a_run_that_weighs_nothing_reads_nothing_first(corpus: Corpus) -> None:
    config = load_config([*corpus.arguments(), *LOSSES, "--training.steps", "1"])
    shape = resolve_shape(config.model, VOCAB_SIZE)
    assert cost_of(config, shape, Workload(replicas=1)).reading == 0.0


@pytest.mark.parametrize("name", ["training", "ahead", "similarity"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    server: Server, corpus: Corpus, alone: dict, tmp_path: Path, name: str
) -> None:
    arguments = [*corpus.arguments(), *RUNS[name], *SAVE]
    stop = {"name": "send_signal", "place": "training", "call": 9, "number": 15, "rank": 0}
    server.succeed(tmp_path / "run", arguments, fault=stop)
    server.succeed(tmp_path / "run", [*arguments, *RESUME])
    assert_same(tmp_path / "run", alone[name])


@pytest.mark.parametrize("layout", [[], ["--parallel.pipeline", "2"]], ids=str)
@pytest.mark.parametrize("frozen", [["--weighting.frozen", "true"], []], ids=str)
def test_a_loaded_model_weighs_from_the_first_step_and_resumes(
    server: Server, corpus: Corpus, alone: dict, tmp_path: Path, frozen: list, layout: list
) -> None:
    """Its first batch is read first, on every stage, because no step before set a temperature."""
    load = ["--weighting.load", str(alone["training"] / "weighting/stage_1"), *frozen]
    method = ["--policy.name", "dwm", "--weighting.encoder", "llm", *load]
    arguments = [*corpus.arguments(), *method, *layout, *SAVE, "--training.steps", "8"]
    server.succeed(tmp_path / "whole", arguments, ranks=1 + bool(layout))
    train = metrics(tmp_path / "whole", "train")
    assert train[0]["weight_std"] > 0.05 and "weight_temperature" in train[1]
    if not layout and frozen:
        assert train[0]["flops"] == pytest.approx(4 * FORWARD, rel=1e-3)
        assert train[1]["flops"] == pytest.approx(7 * FORWARD, rel=1e-3)
        cost = cost_of(
            load_config(arguments),
            resolve_shape(load_config(arguments).model, VOCAB_SIZE),
            Workload(replicas=1),
        )
        assert 8 * (cost.llm + cost.weighting) == pytest.approx(train[-1]["flops"], rel=1e-9)
    stop = {"name": "send_signal", "place": "training", "call": 5, "number": 15, "rank": 0}
    server.succeed(tmp_path / "run", arguments, ranks=1 + bool(layout), fault=stop)
    server.succeed(tmp_path / "run", [*arguments, *RESUME], ranks=1 + bool(layout))
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_key_without_effect_is_refused(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    for change, words in (
        (["--weighting.encoder", "own", "--weighting.normalizer", "first"], "encoder"),
        (
            ["--weighting.group", "micro_batch", "--weighting.normalizer", "first"],
            "weighting.group",
        ),
    ):
        job = server.run(tmp_path / "run", [*corpus.arguments(), *ALONE, *change])
        assert job.codes == [2] and words in job.text and "no effect" in job.text
