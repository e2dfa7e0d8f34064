"""Whole runs of the policies beside the paper's: layouts, when and from what they learn."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from tests.small_runs.command import metrics, pretrain, succeed
from tests.small_runs.fixtures import Corpus

# Sums in another order are 1e-7 apart; 20 steps of Adam at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-5
LLM = ["--policy.name", "dwm", "--weighting.encoder", "llm"]
TRAINING = [*LLM, "--weighting.update_on", "training"]
DOMAINS = ["--policy.name", "domain_mean", "--weighting.damp_by_noise", "true"]
MIXING = ["--policy.name", "validation_mixing", "--policy.mix_fraction", "0.25"]
LOSSES = ["--policy.name", "loss_reweighting"]
SIMILARITY = ["--policy.name", "similarity", "--policy.similarity_temperature", "0.02"]
ALIGNED = ["--policy.name", "gradient_alignment", "--policy.alignment_interval", "2"]
ALIGNED += ["--policy.alignment_warmup", "5"]
GREEDY = [*ALIGNED, "--policy.alignment_choice", "greedy"]
OPUS = ["--policy.name", "opus", "--weighting.pool_batches", "2", "--policy.alignment_warmup", "5"]
OPUS += ["--policy.alignment_interval", "2", "--policy.score_tokens", "16"]
OPUS += ["--logging.weights_interval_steps", "1"]
FIXED = ["--policy.name", "fixed", "--policy.column", "tokens"]
CURRICULUM = ["--policy.name", "curriculum", "--policy.pacing_start", "0.2"]
POLICIES = {
    "training": TRAINING,
    "domain_mean": DOMAINS,
    "validation_mixing": MIXING,
    "loss_reweighting": LOSSES,
    "similarity": SIMILARITY,
    "gradient_alignment": ALIGNED,
    "greedy": GREEDY,
    "opus": OPUS,
    "fixed": FIXED,
    "curriculum": CURRICULUM,
}


@pytest.fixture(scope="module")
def alone(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of one process for every policy."""
    folder = tmp_path_factory.mktemp("alone")
    for name, policy in POLICIES.items():
        succeed(folder / name, *corpus.arguments(), *policy)
    return {name: folder / name for name in POLICIES}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("training", ["--parallel.pipeline", "2"]),
        ("training", ["--parallel.tensor", "2", "--parallel.sequence", "true"]),
        ("training", ["--parallel.sharded_optimizer", "true"]),
        ("domain_mean", []),
        ("validation_mixing", []),
        ("loss_reweighting", ["--parallel.tensor", "2"]),
        ("loss_reweighting", ["--parallel.pipeline", "2"]),
        ("similarity", ["--parallel.tensor", "2", "--parallel.sequence", "true"]),
        ("similarity", []),
        ("gradient_alignment", ["--parallel.pipeline", "2"]),
        ("gradient_alignment", ["--parallel.sharded_optimizer", "true"]),
        ("greedy", ["--parallel.tensor", "2", "--parallel.sequence", "true"]),
        ("opus", ["--parallel.tensor", "2", "--parallel.sequence", "true"]),
        ("opus", ["--parallel.pipeline", "2"]),
        ("opus", []),
        ("opus", ["--parallel.sharded_optimizer", "true"]),
        ("fixed", ["--parallel.pipeline", "2"]),
        ("curriculum", ["--parallel.tensor", "2"]),
        ("training", ["--parallel.context", "2", "--parallel.sharded_optimizer", "true"]),
        ("loss_reweighting", ["--parallel.context", "2"]),
        ("similarity", ["--parallel.context", "2"]),
        ("greedy", ["--parallel.context", "2"]),
        ("opus", ["--parallel.context", "2"]),
    ],
    ids=str,
)
def test_layouts_train_alike(
    corpus: Corpus, alone: dict[str, Path], tmp_path: Path, name: str, layout: list[str]
) -> None:
    succeed(tmp_path / "run", *corpus.arguments(), *POLICIES[name], *layout, processes=2)
    for phase in ("train", "weighting"):
        ours, expected = metrics(tmp_path / "run", phase), metrics(alone[name], phase)
        assert len(ours) == len(expected)
        for line, other in zip(ours, expected, strict=True):
            for key in {"loss", "val_loss"} & set(line):
                assert abs(line[key] - other[key]) < LAYOUT_TOLERANCE, (phase, line["step"])


def test_updates_on_the_training_batch_come_inside_its_step(alone: dict[str, Path]) -> None:
    run_dir = alone["training"]
    train = {line["step"]: line for line in metrics(run_dir, "train")}
    weighting = metrics(run_dir, "weighting")
    assert [line["step"] for line in weighting] == [5, 8, 11, 14, 17]
    for line in weighting:  # the step's own loss, gradient and weights
        step = train[line["step"]]
        for name in ("loss", "grad_norm", "weight_std", "weight_max"):
            assert line[name] == step[name], name
    assert train[5]["weight_std"] == 0.0 < train[6]["weight_std"]
    rows = ds.dataset(run_dir / "weights").to_table().to_pylist()
    learned = [row for row in rows if row["step"] == 5 and row["alignment"] is not None]
    assert [row["sample_id"] for row in learned] == list(range(4 * 8, 5 * 8))


def test_nothing_is_learned_after_freezing(corpus: Corpus, tmp_path: Path) -> None:
    freeze = ("--weighting.freeze_after", "0.5")
    succeed(tmp_path / "run", *corpus.arguments(), *LLM, *freeze)
    assert [line["step"] for line in metrics(tmp_path / "run", "weighting")] == [5, 8]
    assert metrics(tmp_path / "run", "train")[-1]["weight_std"] > 0.0


def test_domains_weigh_alike_inside_and_differ_between(alone: dict[str, Path]) -> None:
    table = ds.dataset(alone["domain_mean"] / "weights").to_table().to_pylist()
    last = [row for row in table if row["step"] == 20]
    by_domain: dict[str, set[float]] = {}
    for row in last:
        by_domain.setdefault(row["domain"], set()).add(row["weight"])
    assert all(len(weights) == 1 for weights in by_domain.values())
    assert len(set.union(*by_domain.values())) == len(by_domain) > 1
    means = json.loads((alone["domain_mean"] / "weighting/stage_1/domain_means.json").read_text())
    ranked = sorted(by_domain, key=lambda name: means[name])
    assert ranked == sorted(by_domain, key=lambda name: max(by_domain[name]))


def test_passages_take_their_part_of_every_batch(alone: dict[str, Path]) -> None:
    table = ds.dataset(alone["validation_mixing"] / "weights").to_table().to_pylist()
    for step in (10, 20):
        rows = [row for row in table if row["step"] == step]
        assert len(rows) == 8 and all(row["weight"] == 1.0 for row in rows)
        assert sum(row["domain"] in ("target", "unknown") for row in rows) == 2
    assert metrics(alone["validation_mixing"], "weighting") == []


def test_passages_of_which_one_word_is_trained_on_are_named(corpus: Corpus, tmp_path: Path) -> None:
    words = [*corpus.arguments(), *MIXING, "--training.steps", "1", "--validation.loss_on"]
    for loss_on, times in (("last_word", 1), ("all", 0)):
        done = pretrain(tmp_path / loss_on, *words, loss_on)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("warning: validation.loss_on last_word: policy") == times


def test_alignments_of_the_batch_weigh_its_own_step(alone: dict[str, Path]) -> None:
    run_dir = alone["gradient_alignment"]
    train = {line["step"]: line for line in metrics(run_dir, "train")}
    weighting = metrics(run_dir, "weighting")
    assert [line["step"] for line in weighting] == list(range(6, 21, 2))
    for step, line in train.items():
        assert (line["weight_std"] > 0.0) == (step in range(6, 21, 2)), step
    for line in weighting:  # the weights that follow from the alignments
        assert line["weight_std"] == train[line["step"]]["weight_std"]
        assert line["weighting_grad_norm"] is None
        assert line["loss"] == pytest.approx(train[line["step"]]["loss"], abs=1e-6)
    rows = ds.dataset(run_dir / "weights").to_table().to_pylist()
    assert {row["step"] for row in rows} == {10, 20}, "as logging.weights_interval_steps says"
    last = sorted((row["alignment"], row["weight"]) for row in rows if row["step"] == 20)
    assert last == sorted(last, key=lambda pair: pair[1])


def test_opus_draws_every_batch_from_its_own_pool(alone: dict[str, Path]) -> None:
    rows = ds.dataset(alone["opus"] / "weights").to_table().to_pylist()
    by_step: dict[int, list[int]] = {}
    for row in rows:
        assert row["weight"] == 1.0 and row["source"] == "training"
        by_step.setdefault(row["step"], []).append(row["sample_id"])
    assert sorted(by_step) == list(range(1, 21))
    places = []
    for step, numbers in by_step.items():
        pool = range((step - 1) * 16, step * 16)
        assert len(set(numbers)) == 8 and set(numbers) <= set(pool)
        places.append(tuple(number - pool.start for number in numbers))
    assert len(set(places)) == 20, "each step draws anew, at random too"
    assert metrics(alone["opus"], "weighting") == []


def test_a_run_that_ends_in_the_warm_up_is_told(corpus: Corpus, tmp_path: Path) -> None:
    for policy, key in (("gradient_alignment", "alignment_warmup"), ("similarity", "warmup_steps")):
        arguments = (*corpus.arguments(), "--policy.name", policy, "--training.steps", "2")
        done = pretrain(tmp_path / policy, *arguments)
        assert done.returncode == 0, done.stderr
        assert f"policy {policy} makes no weighting update in 2 steps: " in done.stderr
        assert key in done.stderr
    arguments = (*corpus.arguments(), "--policy.name", "opus", "--weighting.pool_batches", "2")
    done = pretrain(tmp_path / "opus", *arguments, "--training.steps", "2")
    assert done.returncode == 0, done.stderr
    assert "policy opus draws at random in all 2 steps: " in done.stderr


def test_flops_add_up(alone: dict[str, Path]) -> None:
    """The tiny model's forward pass, multiplied out by hand: 8 rows of 32 tokens."""
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176  # query, out; key, value; SwiGLU
    attention = 64 * 32  # scores and values over half of the 32 positions
    forward = 2 * 8 * 32 * (2 * (layer + attention) + 512 * 64)
    flops = [line["flops"] for line in metrics(alone["validation_mixing"], "train")]
    assert flops == [step * 3 * forward for step in range(1, 21)]
    train = metrics(alone["training"], "train")
    # Five steps before the first update: nothing is weighed, and nothing is read first.
    assert [line["flops"] for line in train[:5]] == [n * 3 * forward for n in range(1, 6)]
    # Two micro-batches of one group: read first, a forward pass more; the head is 0.05 % of it.
    assert train[6]["flops"] - train[5]["flops"] == pytest.approx(4 * forward, rel=2e-3)
    # An update on the training batch adds the validation pass and the probe; every tenth, of which
    # the first is one, a second probe.
    assert train[5]["flops"] - train[4]["flops"] == pytest.approx((4 + 9) * forward, rel=2e-3)
    assert train[8]["flops"] - train[7]["flops"] == pytest.approx((4 + 6) * forward, rel=2e-3)
    # Five steps, then a reading of 8 passages; the first batch that is weighed is read first.
    read = [line["flops"] for line in metrics(alone["similarity"], "train")]
    assert read[:5] == [n * 3 * forward for n in range(1, 6)]
    assert read[5] - read[4] == (4 + 1) * forward and read[6] - read[5] == 3 * forward
    assert read[8] - read[7] == (3 + 1) * forward
    # A pool of 16 rows, of which 16 tokens are read: probe and sketches; 8 passages.
    short = 2 * 16 * 16 * (2 * (layer + 64 * 16) + 512 * 64)
    drawn = [line["flops"] for line in metrics(alone["opus"], "train")]
    assert drawn[:5] == [n * 3 * forward for n in range(1, 6)]
    assert drawn[5] - drawn[4] == (3 + 3) * forward + 4 * short
    assert drawn[6] - drawn[5] == 3 * forward
    # A pass for g at uniform weights, that of 8 passages and the probe; noise in every tenth.
    aligned = [line["flops"] for line in metrics(alone["gradient_alignment"], "train")]
    assert aligned[:5] == [n * 3 * forward for n in range(1, 6)]
    differences = [after - before for before, after in zip(aligned[4:], aligned[5:], strict=False)]
    # An update inside a step is counted after the step's own line.
    assert differences[:4] == [3 * forward, (3 + 9 + 3) * forward, 3 * forward, (3 + 9) * forward]
