"""FLOPs that a run records, multiplied out by hand, and those of its plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dwm.checkpoint.kept_files import write_files
from megatron_dwm.config import Config
from megatron_dwm.config.load import load_config
from megatron_dwm.model import resolve_shape
from megatron_dwm.planning.cost import Cost, cost_of
from megatron_dwm.weighting.costs import Workload
from megatron_dwm.weighting.model import WeightingShape, build_weighting_model
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

VOCAB_SIZE, ROWS, LENGTH = 512, 8, 32
# The tiny LLM's forward pass: query, out; key, value; SwiGLU; half of the positions are seen.
FORWARD = 2 * ROWS * LENGTH * (2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176 + 64 * 32) + 512 * 64)
LOADED = WeightingShape(
    vocab_size=VOCAB_SIZE, hidden_size=48, num_layers=2, num_attention_heads=2, ffn_hidden_size=80
)
STAGED = "--weighting.mode staged --weighting.stages 3 --weighting.updates_per_stage 2".split()


def weighing(width: int, layers: int, inner: int) -> int:
    """Every row's tokens go through the layers, its pooled vector through one layer and a head; the
    groups are of all 8 rows.
    """
    layer = 4 * width**2 + 3 * width * inner
    tokens = LENGTH * layers * (layer + width * LENGTH)
    return 2 * ROWS * (tokens + layer + 2 * width * ROWS + 2 * width)


def in_config(config: Config) -> Cost:
    return cost_of(config, resolve_shape(config.model, VOCAB_SIZE), Workload(replicas=1))


def test_a_frozen_model_is_counted_with_its_own_sizes(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    write_files(build_weighting_model(LOADED, seed=1).files(), tmp_path / "model")
    load = ["--weighting.load", str(tmp_path / "model"), "--weighting.frozen", "true"]
    arguments = [*corpus.arguments(), "--policy.name", "dwm", *load, "--training.steps", "3"]
    server.succeed(tmp_path / "run", arguments)
    a_step = 3 * FORWARD + weighing(48, 2, 80)
    flops = [line["flops"] for line in metrics(tmp_path / "run", "train")]
    assert flops == [a_step, 2 * a_step, 3 * a_step]
    cost = in_config(load_config(arguments))
    assert cost.llm + cost.weighting == pytest.approx(a_step)


def test_a_change_of_costs_leaves_what_was_spent(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """Smaller micro-batches: weights over the global batch then need a pass of their own."""
    method = ["--policy.name", "loss_reweighting", "--weighting.normalizer", "first"]
    arguments = [*corpus.arguments(), *method, "--training.micro_batch_size", str(ROWS)]
    server.succeed(tmp_path / "run", [*arguments, "--training.steps", "2"])
    for steps, size in ((4, ROWS // 2), (5, ROWS // 2), (6, ROWS)):
        more = ["--training.steps", str(steps), "--training.micro_batch_size", str(size)]
        server.succeed(tmp_path / "run", [*arguments, *RESUME, *more])
    lines = metrics(tmp_path / "run", "train")
    of_step = [3, 3, 4, 4, 4, 3]
    sums = [sum(of_step[: number + 1]) * FORWARD for number in range(6)]
    assert [line["flops"] for line in lines] == pytest.approx(sums, rel=1e-12)
    assert lines[-1]["flops_weighting"] == pytest.approx(3 * FORWARD, rel=1e-12)


@pytest.mark.parametrize("kept", ["equal", "learned"])
def test_a_pool_is_scored_in_every_step(
    server: Server, corpus: Corpus, tmp_path: Path, kept: str
) -> None:
    """Three groups of 8; what is kept is weighed once more if it is to have weights."""
    write_files(build_weighting_model(LOADED, seed=1).files(), tmp_path / "model")
    load = ["--weighting.load", str(tmp_path / "model"), "--weighting.frozen", "true"]
    pool = ["--weighting.pool_batches", "3", "--weighting.kept_weights", kept]
    arguments = [*corpus.arguments(), "--policy.name", "dwm", *load, *pool, "--training.steps", "3"]
    server.succeed(tmp_path / "run", arguments)
    a_step = 3 * FORWARD + (3 + (kept == "learned")) * weighing(48, 2, 80)
    flops = [line["flops"] for line in metrics(tmp_path / "run", "train")]
    assert flops == [a_step, 2 * a_step, 3 * a_step]
    cost = in_config(load_config(arguments))
    assert cost.llm + cost.weighting == pytest.approx(a_step)


@pytest.mark.parametrize("reads_llm", [False, True])
def test_the_llm_reads_a_pool_only_for_its_features(corpus: Corpus, reads_llm: bool) -> None:
    encoder = ["--weighting.encoder", "llm" if reads_llm else "own"]
    pool = ["--weighting.frozen", "true", "--weighting.pool_batches", "3"]
    cost = in_config(load_config([*corpus.arguments(), "--policy.name", "dwm", *encoder, *pool]))
    assert cost.pool_passes == (3 * FORWARD if reads_llm else 0)
    assert cost.pool_scores > 0 and cost.reading == cost.weighing == 0.0


@pytest.mark.parametrize("loads", [False, True])
def test_steps_and_updates_weigh_once_there_is_a_model(
    server: Server, corpus: Corpus, tmp_path: Path, loads: bool
) -> None:
    """Three stages of 2, 2 and 3 steps; two updates before the second and the third."""
    arguments = [*corpus.arguments(), "--policy.name", "dwm", *STAGED, "--training.steps", "7"]
    model = (32, 1, 64)
    if loads:
        write_files(build_weighting_model(LOADED, seed=1).files(), tmp_path / "model")
        arguments += ["--weighting.load", str(tmp_path / "model")]
        model = (48, 2, 80)
    server.succeed(tmp_path / "run", arguments)
    weight = weighing(*model)
    # Two micro-batches, so an update's encoder goes forward, forward again and backward; every
    # tenth update, of which the first is one, measures noise.
    update = 3 * 3 * FORWARD + 4 * weight
    train = [line["flops"] for line in metrics(tmp_path / "run", "train")]
    assert train[1] == 2 * 3 * FORWARD + (2 * weight if loads else 0)
    steps = 7 * 3 * FORWARD + (7 if loads else 5) * weight
    updates = 4 * update + (4 if loads else 3) * weight + 3 * FORWARD
    assert train[-1] == steps + updates
    cost = in_config(load_config(arguments))
    assert 7 * (cost.llm + cost.weighting) == pytest.approx(train[-1])


def test_a_resumed_run_counts_on(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    arguments = [*corpus.arguments(), "--policy.name", "dwm", "--training.steps", "8"]
    server.succeed(tmp_path / "run", arguments)
    more = ["--run.resume", "true", "--training.steps", "9"]
    server.succeed(tmp_path / "run", [*arguments, *more])
    train = [line["flops"] for line in metrics(tmp_path / "run", "train")]
    # The update before step 9 is the second, and its batch is weighed.
    update = 3 * 3 * FORWARD + 4 * weighing(32, 1, 64)
    assert train[8] - train[7] == 3 * FORWARD + update + 2 * weighing(32, 1, 64)


@pytest.mark.parametrize(
    "policy",
    [
        ["similarity", "--weighting.interval_steps", "2"],
        [
            "gradient_alignment",
            "--policy.alignment_interval",
            "2",
            "--policy.alignment_warmup",
            "3",
        ],
        ["gradient_alignment", "--policy.alignment_choice", "greedy"],
        ["opus", "--weighting.pool_batches", "3", "--policy.alignment_warmup", "4"],
    ],
    ids=lambda policy: policy[0],
)
def test_rules_cost_what_their_plan_says(
    server: Server, corpus: Corpus, tmp_path: Path, policy: list[str]
) -> None:
    """Readings of the target, and of the first batch with weights; alignments and noise."""
    arguments = [*corpus.arguments(), "--policy.name", *policy, "--training.steps", "9"]
    if "greedy" in policy:
        arguments += ["--policy.alignment_warmup", "4"]
    server.succeed(tmp_path / "run", arguments)
    *_, last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    cost = in_config(load_config(arguments))
    assert 9 * (cost.llm + cost.weighting) == pytest.approx(json.loads(last)["flops"])
