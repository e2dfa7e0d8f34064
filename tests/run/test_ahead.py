"""Whole runs with `weighting.update_on ahead`: layouts, records, FLOPs and resume."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds
import pytest

from megatron_dwm.config.load import load_config
from megatron_dwm.model import resolve_shape
from megatron_dwm.planning.cost import cost_of
from megatron_dwm.weighting.costs import Workload
from tests.run.test_flops import FORWARD, VOCAB_SIZE
from tests.small_runs.command import RESUME, metrics, pretrain, succeed
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same

# Sums in another order are 1e-7 apart; 20 steps of Adam at 3e-3 may multiply that.
LAYOUT_TOLERANCE = 1e-5
ALWAYS = ["--weighting.update_on", "ahead", "--training.micro_batch_size", "2"]
# Which samples half of the micro-batches are depends on the number of replicas.
ALWAYS += ["--weighting.probe_fraction", "1"]
DWM = ["--policy.name", "dwm", "--weighting.encoder", "llm", *ALWAYS]
FEW = ["--validation.batch_size", "3"]
HALF = ["--weighting.probe_fraction", "0.5"]
RUNS = {
    "whole": DWM,
    "few": [*DWM, *FEW, *HALF],
    "own": ["--policy.name", "dwm", *ALWAYS, *FEW],
    "domain_mean": ["--policy.name", "domain_mean", "--weighting.damp_by_noise", "true", *ALWAYS],
}
LAYOUTS = [
    ("whole", []),
    ("whole", ["--parallel.sharded_optimizer", "true"]),
    ("few", ["--parallel.pipeline", "2"]),
    ("few", ["--parallel.tensor", "2", "--parallel.sequence", "true"]),
    ("own", []),
    ("own", ["--parallel.tensor", "2", "--model.recompute", "full"]),
    ("few", ["--parallel.context", "2"]),
    ("own", ["--parallel.context", "2"]),
    ("domain_mean", []),
    ("domain_mean", ["--parallel.pipeline", "2"]),
]


@pytest.fixture(scope="module")
def alone(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of one process of each kind."""
    folder = tmp_path_factory.mktemp("alone")
    for name, arguments in RUNS.items():
        succeed(folder / name, *corpus.arguments(), *arguments)
    return {name: folder / name for name in RUNS}


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_layouts_train_alike(
    corpus: Corpus, alone: dict[str, Path], tmp_path: Path, name: str, layout: list[str]
) -> None:
    succeed(tmp_path / "run", *corpus.arguments(), *RUNS[name], *layout, processes=2)
    for phase in ("train", "weighting"):
        ours, expected = metrics(tmp_path / "run", phase), metrics(alone[name], phase)
        assert len(ours) == len(expected) > 0
        for line, other in zip(ours, expected, strict=True):
            for key in {"loss", "val_loss"} & set(line):
                assert abs(line[key] - other[key]) < LAYOUT_TOLERANCE, (phase, line["step"])


def test_updates_come_inside_the_step_and_change_the_next_one(alone: dict[str, Path]) -> None:
    train = {line["step"]: line for line in metrics(alone["few"], "train")}
    weighting = metrics(alone["few"], "weighting")
    assert [line["step"] for line in weighting] == [5, 8, 11, 14, 17]
    for line in weighting:
        assert "grad_norm" not in line, "it is not known before the step"
        assert line["weight_std"] == train[line["step"]]["weight_std"]
        assert line["alignment_std"] > 0.0
    assert train[5]["weight_std"] == 0.0 < train[6]["weight_std"]
    assert "alignment_agreement" in weighting[0] and "alignment_agreement" not in weighting[1]


def test_alignments_of_the_probed_micro_batches_are_recorded(alone: dict[str, Path]) -> None:
    rows = ds.dataset(alone["few"] / "weights").to_table().to_pylist()
    learned = [row for row in rows if row["step"] == 5]
    assert [row["sample_id"] for row in learned] == list(range(4 * 8, 5 * 8))
    assert [row["alignment"] is not None for row in learned] == [True] * 4 + [False] * 4


def test_flops_are_those_of_the_plan_and_of_a_sum_by_hand(
    corpus: Corpus, alone: dict[str, Path]
) -> None:
    """The head is 0.05 % of a forward pass of the LLM, and its learning three times that."""
    flops = [line["flops"] for line in metrics(alone["few"], "train")]
    assert flops[:5] == [n * 3 * FORWARD for n in range(1, 6)]
    # Three of eight passages, and half of the micro-batches; the first update measures noise. A
    # global group reads its batch first.
    passages, probe, reading = 3 * FORWARD * 3 / 8, FORWARD / 2, FORWARD
    first = 3 * FORWARD + reading + passages + 2 * probe
    assert flops[5] - flops[4] == pytest.approx(first, rel=4e-3)
    later = 3 * FORWARD + reading + passages + probe
    assert flops[8] - flops[7] == pytest.approx(later, rel=4e-3)
    config = load_config([*corpus.arguments(), *RUNS["few"]])
    cost = cost_of(config, resolve_shape(config.model, VOCAB_SIZE), Workload(replicas=1))
    assert 20 * (cost.llm + cost.weighting) == pytest.approx(flops[-1], rel=1e-9)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    save = ["--training.checkpoint_interval_steps", "3"]
    arguments = [*corpus.arguments(), *RUNS["few"], *save]
    server.succeed(tmp_path / "whole", arguments)
    stop = {"name": "send_signal", "place": "training", "call": 9, "number": 15, "rank": 0}
    server.succeed(tmp_path / "stopped", arguments, fault=stop)
    server.succeed(tmp_path / "stopped", [*arguments, *RESUME])
    assert_same(tmp_path / "stopped", tmp_path / "whole")


MISTAKES = [
    (["--weighting.mode", "staged"], "weighting.update_on ahead: one LLM step gives one update"),
    (["--bilevel.estimator", "finite_difference"], "carries the tangent probe"),
    (["--weighting.warmup_steps", "1"], "expected 2 or more with weighting.update_on ahead"),
    (["--weighting.probe_fraction", "0.3"], "a step has 4 micro-batches"),
    (["--weighting.probe_fraction", "0"], "weighting.probe_fraction"),
    (["--weighting.update_on", "training", *HALF], "it needs weighting.update_on ahead"),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES, ids=str)
def test_what_cannot_be_done_is_one_line(
    corpus: Corpus, tmp_path: Path, change: list[str], words: str
) -> None:
    done = pretrain(tmp_path / "run", *corpus.arguments(), *DWM, *change)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: "), done.stderr
