"""A frozen weighting model as a filter: which samples of a pool it keeps, layouts, resuming."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds
import pytest
import torch

from megatron_dwm.checkpoint.kept_files import write_files
from megatron_dwm.convert.to_hf import export_to_huggingface
from megatron_dwm.weighting.model import WeightingShape, build_weighting_model
from tests.launch import run_ranks
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same, saved_step

BATCH, POOLS, STEPS = 8, 3, 6
# Sums in another order are 1e-7 apart; some steps of Adam at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-5
# fp32 logits, of the order of 1, against double precision; hidden states add some rounding.
LOGIT_TOLERANCE = 1e-4
MICRO = ["--weighting.group", "micro_batch"]
FOUR = ["--model.num_layers", "4"]


def model_of(encoder: str, folder: Path) -> list[str]:
    """Options of a run that filters by a model far from its start, whose heads are zero."""
    shape = WeightingShape(
        vocab_size=512,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        ffn_hidden_size=48,
        encoder=encoder,
        feature_size=64 if encoder == "llm" else 0,
    )
    model, generator = build_weighting_model(shape, seed=3), torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    write_files(model.files(), folder / encoder)
    return [
        *("--policy.name", "dwm", "--weighting.encoder", encoder, "--weighting.frozen", "true"),
        *("--weighting.load", str(folder / encoder), "--weighting.pool_batches", str(POOLS)),
        *("--training.steps", str(STEPS), "--logging.weights_interval_steps", "1"),
    ]


@pytest.fixture(scope="module")
def filters(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Arguments of a run for each encoder."""
    folder = tmp_path_factory.mktemp("models")
    return {name: [*corpus.arguments(), *model_of(name, folder)] for name in ("own", "llm")}


@pytest.fixture(scope="module")
def alone(
    server: Server, filters: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A finished run of one process for every encoder; that of four layers for interleaving."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {**filters, "own, four layers": [*filters["own"], *FOUR]}
    for name, arguments in runs.items():
        server.succeed(folder / name, arguments)
    return {name: folder / name for name in runs}


def kept(run_dir: Path) -> dict[int, list[tuple[int, float]]]:
    """Numbers and weights of the samples of every step, from the run's weights."""
    found: dict[int, list[tuple[int, float]]] = {}
    for row in ds.dataset(run_dir / "weights").to_table().to_pylist():
        assert row["source"] == "training"
        found.setdefault(row["step"], []).append((row["sample_id"], row["weight"]))
    return found


def assert_largest(samples: list[int], by_hand: dict[str, torch.Tensor], name: str = "") -> None:
    """The samples are those with the largest logits, in the order of the pool."""
    logits = dict(zip(by_hand["numbers"].tolist(), by_hand["logits"].tolist(), strict=True))
    ranked = sorted(logits, key=lambda number: -logits[number])
    gap = logits[ranked[BATCH - 1]] - logits[ranked[BATCH]]
    assert gap > LOGIT_TOLERANCE, "rounding does not decide"
    assert samples == sorted(ranked[:BATCH]), name


@pytest.mark.parametrize("group", ["global", "micro_batch"])
def test_the_kept_samples_have_the_largest_logits(
    server: Server, filters: dict[str, list[str]], tmp_path: Path, group: str
) -> None:
    run_dir = tmp_path / "run"
    server.succeed(run_dir, [*filters["own"], "--weighting.group", group])
    cases = [{"run_dir": str(run_dir), "step": step} for step in (0, 4)]
    worker = "tests.weighting.pool_workers:pool_logits"
    found = kept(run_dir)
    assert sorted(found) == list(range(1, STEPS + 1))
    for case, [by_hand] in zip(cases, run_ranks(worker, 1, cases), strict=True):
        rows = found[case["step"] + 1]
        assert_largest([number for number, _ in rows], by_hand, f"{group}, {case}")
        assert {weight for _, weight in rows} == {1.0}


def test_the_llms_features_are_those_of_the_step(
    server: Server, filters: dict[str, list[str]], tmp_path: Path
) -> None:
    """Against transformers' hidden states of the model after three steps, exported."""
    run_dir, exported = tmp_path / "run", tmp_path / "exported"
    save = ["--training.checkpoint_interval_steps", "3"]
    server.succeed(run_dir, [*filters["llm"], *MICRO, *save])
    export_to_huggingface(run_dir / "checkpoints/step_00000003", exported)
    case = {"run_dir": str(run_dir), "step": 3, "exported": str(exported)}
    [[by_hand]] = run_ranks("tests.weighting.pool_workers:pool_logits", 1, [case])
    assert_largest([number for number, _ in kept(run_dir)[4]], by_hand)


def test_kept_samples_may_train_with_their_weights(
    server: Server, filters: dict[str, list[str]], tmp_path: Path
) -> None:
    """In the new batch, which is a group of its own: n softmax of its logits."""
    run_dir = tmp_path / "run"
    learned = ["--weighting.kept_weights", "learned", "--training.steps", "1"]
    free = ["--weighting.min_effective_sample_size", "0"]
    server.succeed(run_dir, [*filters["own"], *learned, *free])
    samples, weights = zip(*kept(run_dir)[1], strict=True)
    case = {"run_dir": str(run_dir), "step": 0}
    cases = [case, {**case, "samples": list(samples)}]
    worker = "tests.weighting.pool_workers:pool_logits"
    [by_hand], [of_batch] = run_ranks(worker, 1, cases)
    assert_largest(list(samples), by_hand)
    expected = BATCH * torch.softmax(of_batch["logits"], dim=0)
    found = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=LOGIT_TOLERANCE, atol=0)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("own", ["--parallel.tensor", "2", "--parallel.sequence", "true"]),
        ("own", ["--parallel.pipeline", "2"]),
        ("own", []),
        ("own, four layers", ["--parallel.pipeline", "2", "--parallel.virtual_stages", "2"]),
        ("llm", ["--parallel.tensor", "2", "--parallel.sequence", "true"]),
        ("llm", ["--parallel.pipeline", "2"]),
        ("llm", ["--parallel.sharded_optimizer", "true"]),
    ],
    ids=str,
)
def test_layouts_keep_the_same(
    server: Server,
    filters: dict[str, list[str]],
    alone: dict[str, Path],
    tmp_path: Path,
    name: str,
    layout: list[str],
) -> None:
    four = FOUR if "four" in name else []
    server.succeed(tmp_path / "run", [*filters[name.split(",")[0]], *four, *layout], ranks=2)
    assert kept(tmp_path / "run") == kept(alone[name])
    ours, expected = (metrics(run, "train") for run in (tmp_path / "run", alone[name]))
    for line, other in zip(ours, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=LAYOUT_TOLERANCE)
        assert line["flops"] == other["flops"] and line["tokens"] == other["tokens"]


@pytest.mark.parametrize(("name", "ranks"), [("own", 1), ("llm", 2)])
def test_a_killed_run_goes_on_bit_for_bit(
    server: Server,
    filters: dict[str, list[str]],
    tmp_path: Path,
    name: str,
    ranks: int,
) -> None:
    arguments = [*filters[name], "--training.checkpoint_interval_steps", "2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    server.succeed(whole, arguments, ranks=ranks)
    kill = {"name": "send_signal", "place": "training", "call": 5, "number": 9, "rank": 0}
    server.run(resumed, arguments, ranks=ranks, fault=kill)
    assert saved_step(resumed) == 4
    server.succeed(resumed, [*arguments, *RESUME], ranks=ranks)
    assert_same(resumed, whole)
    assert kept(resumed) == kept(whole)


def test_one_batch_is_no_pool(
    server: Server, filters: dict[str, list[str]], tmp_path: Path
) -> None:
    """A pool of one batch is the path without pools: the model weighs every batch."""
    arguments = filters["own"]
    place = arguments.index("--weighting.pool_batches")
    without = [*arguments[:place], *arguments[place + 2 :]]
    server.succeed(tmp_path / "one", [*without, "--weighting.pool_batches", "1"])
    server.succeed(tmp_path / "none", without)
    assert_same(tmp_path / "one", tmp_path / "none")
    assert metrics(tmp_path / "one", "train")[0]["weight_std"] > 0.0


MISTAKES = {
    "--weighting.frozen false": "weighting.pool_batches 3: expected weighting.frozen true",
    "--weighting.unit document": "weighting.unit document: expected sample with weighting.pool",
    "--weighting.uniform_floor 0.1": "weighting.uniform_floor: has no effect",
    "--weighting.pool_batches 1 --weighting.kept_weights learned": (
        "weighting.kept_weights: has no effect: weighting.pool_batches is 1, and it needs "
        "weighting.pool_batches above 1"
    ),
    "--weighting.pool_batches 1000 --training.steps 100000": (
        "training.steps or weighting.pool_batches, a smaller"
    ),
    "--weighting.pool_batches 1001": "expected a number from 1 to 1,000, got 1001",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(
    server: Server, filters: dict[str, list[str]], tmp_path: Path, mistake: str
) -> None:
    job = server.run(tmp_path / "run", [*filters["own"], *mistake.split()])
    assert job.codes == [2], job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert MISTAKES[mistake] in line
