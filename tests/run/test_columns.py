"""Runs with weights from columns of the metadata, against the sidecar by hand.

The runs of documents also say of which pieces the samples of the other runs consist, for the order
of the samples depends on the seed alone.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest
from tests.run.test_units import rows_of
from tests.small_runs.command import RESUME, metrics
from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server
from tests.small_runs.progress import assert_same

BATCH, MICRO_BATCH, STEPS = 8, 4, 6
FIXED = ["--policy.name", "fixed", "--policy.column", "score"]
PACING = {"start": 0.2, "power": 2.0, "steps": 0.8}
CURRICULUM = [
    *("--policy.name", "curriculum", "--policy.difficulty", "hard"),
    *(word for name, value in PACING.items() for word in (f"--policy.pacing_{name}", str(value))),
]
POLICIES = {"fixed": FIXED, "curriculum": CURRICULUM}
CASES = [
    (p, u, g) for p in POLICIES for u in ("sample", "document") for g in ("micro_batch", "global")
]
LAYOUTS = {
    "tensor": ["--parallel.tensor", "2"],
    "pipeline": ["--parallel.pipeline", "2"],
    "data": [],
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """Two prefixes with columns `score` and `hard`, and these by document over both."""

    arguments: list[str]
    prefixes: list[Path]
    columns: dict[str, list[float]]
    lengths: list[list[int]]


def _write(table: pa.Table, path: Path) -> pa.Table:
    numbers = range(len(table))
    scored = table.append_column("score", pa.array([(n * 37 % 101) / 50 for n in numbers]))
    scored = scored.append_column("hard", pa.array([float(n * 53 % 97 - 40) for n in numbers]))
    scored = scored.append_column("zero", pa.array([0] * len(table)))
    pq.write_table(scored, path, row_group_size=11)
    return scored


@pytest.fixture(scope="module")
def scored(short: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("scored")
    tables, prefixes = [], [folder / "a", folder / "b"]
    for prefix in prefixes:
        for end in ("bin", "idx"):
            shutil.copy(f"{short.prefix}.{end}", f"{prefix}.{end}")
        tables.append(
            _write(pq.read_table(f"{short.prefix}.meta.parquet"), Path(f"{prefix}.meta.parquet"))
        )
    arguments = [*short.arguments(), "--data.sequence_length", "128"]
    arguments += ["--data.train", "1", str(prefixes[0]), "2", str(prefixes[1])]
    arguments += ["--training.steps", str(STEPS), "--logging.weights_interval_steps", "1"]
    return Scored(
        arguments,
        prefixes,
        {
            name: sum((table[name].to_pylist() for table in tables), [])
            for name in ("score", "hard")
        },
        [table["tokens"].to_pylist() for table in tables],
    )


def _arguments(policy: str, unit: str, group: str) -> list[str]:
    return [*POLICIES[policy], "--weighting.unit", unit, "--weighting.group", group]


@pytest.fixture(scope="module")
def alone(
    server: Server, scored: Scored, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], Path]:
    """A finished run of one process for every case."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for case in CASES:
        found[case] = folder / "_".join(case)
        server.succeed(found[case], [*scored.arguments, *_arguments(*case)])
    return found


def _values(rows: list[Row], pieces: list[Row], unit: str, column: list[float]) -> list[float]:
    """The value of every recorded unit, from the pieces of documents in its sample."""
    if unit == "document":
        return [column[row["document_id"]] for row in rows]
    sums: dict[int, float] = defaultdict(float)
    tokens: dict[int, int] = defaultdict(int)
    for piece in pieces:
        sums[piece["sample_id"]] += piece["tokens"] * column[piece["document_id"]]
        tokens[piece["sample_id"]] += piece["tokens"]
    return [sums[row["sample_id"]] / tokens[row["sample_id"]] for row in rows]


def _groups(rows: list[Row], group: str) -> list[list[int]]:
    """Places in `rows` of the units of every group."""
    size, found = BATCH if group == "global" else MICRO_BATCH, defaultdict(list)
    for place, row in enumerate(rows):
        found[row["sample_id"] // size].append(place)
    return list(found.values())


@pytest.mark.parametrize(("unit", "group"), [case[1:] for case in CASES[:4]])
def test_fixed_weights_by_hand(
    scored: Scored, alone: dict[tuple[str, str, str], Path], unit: str, group: str
) -> None:
    rows, pieces = rows_of(alone["fixed", unit, group]), rows_of(alone["fixed", "document", group])
    values = _values(rows, pieces, unit, scored.columns["score"])
    assert len(rows) > BATCH * STEPS or unit == "sample"
    for places in _groups(rows, group):
        size = sum(rows[i]["tokens"] for i in places)
        mean = sum(rows[i]["tokens"] * values[i] for i in places) / size
        for i in places:
            # float32 values and weights.
            assert rows[i]["weight"] == pytest.approx(values[i] / mean, rel=1e-6)


def _thresholds(scored: Scored) -> list[float]:
    """For every step the difficulty of the last token of the easiest fraction c."""
    shares = []
    for share, lengths, first in zip(
        (1, 2), scored.lengths, (0, len(scored.lengths[0])), strict=True
    ):
        for number, length in enumerate(lengths):
            hard = scored.columns["hard"][first + number]
            shares.append((hard, share / 3 * length / sum(lengths)))
    found = []
    for step in range(STEPS):
        start = PACING["start"] ** PACING["power"]
        progress = step / (PACING["steps"] * STEPS)
        competence = (progress * (1 - start) + start) ** (1 / PACING["power"])
        below, largest = 0.0, float("inf")
        for hard, share in sorted(shares):
            below += share
            if below >= competence:
                largest = hard
                break
        found.append(largest if competence < 1 else float("inf"))
    return found


@pytest.mark.parametrize("group", ["micro_batch", "global"])
def test_a_curriculum_of_documents_by_hand(
    scored: Scored, alone: dict[tuple[str, str, str], Path], group: str
) -> None:
    rows, thresholds = rows_of(alone["curriculum", "document", group]), _thresholds(scored)
    values = _values(rows, rows, "document", scored.columns["hard"])
    assert thresholds == sorted(thresholds) and thresholds[-1] == float("inf") > thresholds[-2]
    dropped = 0
    for places in _groups(rows, group):
        largest = max(thresholds[rows[places[0]]["step"] - 1], min(values[i] for i in places))
        kept = [i for i in places if values[i] <= largest]
        size = sum(rows[i]["tokens"] for i in places)
        weight = size / sum(rows[i]["tokens"] for i in kept)
        dropped += len(places) - len(kept)
        for i in places:
            assert rows[i]["weight"] == (pytest.approx(weight, rel=1e-6) if i in kept else 0.0)
    assert dropped > len(rows) // 10


@pytest.mark.parametrize("group", ["micro_batch", "global"])
def test_a_curriculum_of_samples_keeps_the_easiest(
    scored: Scored, alone: dict[tuple[str, str, str], Path], group: str
) -> None:
    """In every group all that is kept is easier than all that is not, and weighs the same."""
    rows = rows_of(alone["curriculum", "sample", group])
    pieces = rows_of(alone["curriculum", "document", group])
    values = _values(rows, pieces, "sample", scored.columns["hard"])
    kept = [0] * (STEPS + 1)
    for places in _groups(rows, group):
        easy = [i for i in places if rows[i]["weight"] > 0]
        assert {rows[i]["weight"] for i in easy} == {rows[easy[0]]["weight"]}
        assert rows[easy[0]]["weight"] == pytest.approx(len(places) / len(easy))
        others = [values[i] for i in places if i not in easy]
        assert not others or max(values[i] for i in easy) < min(others)
        kept[rows[places[0]]["step"]] += len(easy)
    # c is 0.2, 0.48, 0.65, 0.78, 0.9 and 1 of 8 samples.
    assert kept[1] <= 5 and kept[-1] == BATCH and sum(kept[1:4]) < sum(kept[4:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_weigh_bit_for_bit_alike(
    server: Server,
    scored: Scored,
    alone: dict[tuple[str, str, str], Path],
    tmp_path: Path,
    layout: str,
) -> None:
    for case in CASES:
        if case[1:] in (("document", "global"), ("sample", "micro_batch")):
            run_dir = tmp_path / "_".join(case)
            arguments = [*scored.arguments, *_arguments(*case), *LAYOUTS[layout]]
            server.succeed(run_dir, arguments, ranks=2)
            ours, expected = rows_of(run_dir), rows_of(alone[case])
            assert [row["weight"] for row in ours] == [row["weight"] for row in expected], case
            for row, other in zip(ours, expected, strict=True):
                # Sums in another order, and a few steps of Adam.
                assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "case", [("fixed", "document", "global"), ("curriculum", "sample", "global")]
)
def test_resumed_bit_for_bit_and_not_with_another_column(
    server: Server,
    scored: Scored,
    alone: dict[tuple[str, str, str], Path],
    tmp_path: Path,
    case: tuple[str, str, str],
) -> None:
    arguments, run_dir = [*scored.arguments, *_arguments(*case)], tmp_path / "run"
    stop = {"name": "send_signal", "place": "training", "call": 3, "number": 15, "rank": 0}
    server.succeed(run_dir, arguments, fault=stop)
    assert 0 < read_manifest(list_checkpoints(run_dir)[-1]).state.step < STEPS
    shutil.copytree(run_dir, tmp_path / "other")
    server.succeed(run_dir, [*arguments, *RESUME])
    assert_same(run_dir, alone[case])
    assert rows_of(run_dir) == rows_of(alone[case])
    key, column = ("column", "score") if case[0] == "fixed" else ("difficulty", "hard")
    file = Path(f"{scored.prefixes[1]}.meta.parquet")
    before = file.read_bytes()
    try:
        table = pq.read_table(file)
        values = table[column].to_pylist()
        changed = table.drop_columns([column]).append_column(column, pa.array([*values[1:], 7.0]))
        pq.write_table(changed, file)
        job = server.run(tmp_path / "other", [*arguments, *RESUME])
        assert job.codes == [2], job.text
        [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
        assert "values in .meta.parquet" in line and line.count("documents)") == 2
        allow = ["--run.allow_changed", f"policy.{key}"]
        server.succeed(tmp_path / "other", [*arguments, *RESUME, *allow])
    finally:
        file.write_bytes(before)


def test_the_end_of_a_curriculum_and_equal_values_are_plain_training(
    server: Server, scored: Scored, tmp_path: Path
) -> None:
    """Bit for bit, and at the same FLOPs."""
    equal = json.dumps(dict.fromkeys(_domains(scored), 0.7))
    runs = {
        "uniform": ["--policy.name", "uniform"],
        "curriculum": ["--policy.name", "curriculum", "--policy.pacing_start", "1"],
        "fixed": ["--policy.name", "fixed", "--policy.domain_weights", equal],
    }
    for name, policy in runs.items():
        unit = ["--weighting.unit", "document"]
        server.succeed(tmp_path / name, [*scored.arguments, *policy, *unit])
    for name in ("curriculum", "fixed"):
        assert_same_training(tmp_path / name, tmp_path / "uniform")


def assert_same_training(run_dir: Path, expected: Path) -> None:
    """Every line but for the clock, and every byte of the parameters and moments."""
    for ours, theirs in zip(metrics(run_dir, "train"), metrics(expected, "train"), strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    found, wanted = (read_manifest(list_checkpoints(d)[-1]).files for d in (run_dir, expected))
    names = [name for name in wanted if name.endswith(".distcp")]
    assert names and all(found[name] == wanted[name] for name in names)


def _domains(scored: Scored) -> list[str]:
    return sorted(set(pq.read_table(f"{scored.prefixes[0]}.meta.parquet")["domain"].to_pylist()))


def test_weights_of_domains(server: Server, scored: Scored, tmp_path: Path) -> None:
    first = _domains(scored)[0]
    policy = ["--policy.name", "fixed", "--policy.domain_weights", f"{first}=3"]
    server.succeed(tmp_path / "run", [*scored.arguments, *policy, "--weighting.unit", "document"])
    rows = rows_of(tmp_path / "run")
    for places in _groups(rows, "global"):
        sizes = [rows[i]["tokens"] * (3 if rows[i]["domain"] == first else 1) for i in places]
        mean = sum(sizes) / sum(rows[i]["tokens"] for i in places)
        for i in places:
            value = 3 if rows[i]["domain"] == first else 1
            assert rows[i]["weight"] == pytest.approx(value / mean, rel=1e-6)


MISTAKES = [
    (["--policy.name", "fixed"], "policy.column: policy fixed needs"),
    ([*FIXED, "--policy.domain_weights", "a=1"], "expected one of the two, got both"),
    (["--policy.name", "fixed", "--policy.column", "scores"], "it has source_file, record, tokens"),
    (["--policy.name", "fixed", "--policy.column", "domain"], "it is string, expected numbers"),
    (["--policy.name", "fixed", "--policy.column", "hard"], "document 0 of .*: .*, 0 or more"),
    (["--policy.name", "fixed", "--policy.column", "zero"], "column zero: every document .* 0"),
    (
        ["--policy.name", "fixed", "--policy.domain_weights", "wbe=2"],
        "wbe: no document .*there are",
    ),
    (["--policy.name", "fixed", "--policy.domain_weights", "web"], "expected NAME=NUMBER"),
    (["--policy.name", "fixed", "--policy.domain_weights", "a=-1"], "weights a: expected a number"),
    (["--policy.name", "curriculum", "--policy.difficulty", "score2"], "policy.difficulty score2"),
    ([*FIXED, "--weighting.unit", "token"], "weighting.unit token: expected document or sample"),
    (
        [*FIXED, "--weighting.group", "micro_batch", "--training.micro_batch_size", "1"],
        "always weighs 1",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes_are_one_line(
    server: Server, scored: Scored, tmp_path: Path, arguments: list[str], words: str
) -> None:
    job = server.run(tmp_path / "run", [*scored.arguments, *arguments])
    assert job.codes == [2] and "Traceback" not in job.text, job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert re.search(words, line), line
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_groups_without_weight_are_announced(
    server: Server, scored: Scored, tmp_path: Path
) -> None:
    """Nearly all documents weigh 0: the groups of such documents weigh 1 each, which is said."""
    others = dict.fromkeys(_domains(scored)[1:], 0)
    policy = ["--policy.name", "fixed", "--policy.domain_weights", json.dumps(others)]
    policy += ["--weighting.group", "micro_batch", "--training.micro_batch_size", "2"]
    job = server.succeed(tmp_path / "run", [*scored.arguments, *policy])
    [line] = [line for line in job.text.splitlines() if "every unit has the value 0" in line]
    assert line.startswith("warning: in about ")
    weights = [row["weight"] for row in rows_of(tmp_path / "run")]
    assert 1.0 in weights and 0.0 in weights
