"""docs/metrics.md describes exactly the keys that real runs write."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.small_runs.command import succeed
from tests.small_runs.fixtures import Corpus

DOCUMENT = Path(__file__).parent.parent / "docs" / "metrics.md"
EVERY_LINE = "In every line"
WEIGHTS = "weights/*.parquet"
TOKENS = "token_weights/*.parquet"
SOURCES = {"training", "update", "target"}
EVERY_WEIGHT = ["--logging.weights_interval_steps", "1"]
BROKEN = ["--training.learning_rate", "1e4", "--training.weight_decay", "1e4"]
BLADE = ["--policy.sync_first_step", "1", "--policy.sync_interval_steps", "2"]
BLADE += [*EVERY_WEIGHT, "--policy.reference_steps", "2"]
_ALIGNED = ["--policy.alignment_warmup", "1"]
_DEFERRED = ["--weighting.encoder", "llm", "--weighting.across_samples", "false"]
_DEFERRED += ["--weighting.update_on", "ahead"]
_KEY = re.compile(r"`([a-z_]+)`")

Keys = dict[str, set[str]]


def described() -> tuple[Keys, Keys]:
    """The keys of every section's table, and those of them that may be absent or null."""
    found: Keys = defaultdict(set)
    sometimes: Keys = defaultdict(set)
    section = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ").partition(":")[0]
        elif line.startswith("| `"):
            cells = line.split("|")[1:-1]
            assert len(cells) == 5, f"a row has five cells: {line}"
            keys = set(_KEY.findall(cells[0]))
            assert not keys & found[section], f"{section}: described twice: {keys}"
            found[section] |= keys
            if "*sometimes*" in cells[2]:
                sometimes[section] |= keys
    return found, sometimes


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Short runs that together write every phase."""
    folder = tmp_path_factory.mktemp("runs")
    options = {
        # A model that learns, on batches of its own; its first update measures noise.
        "fresh": ["--policy.name", "dwm", *_steps(9), *corpus.held_out()],
        "deferred": ["--policy.name", "dwm", *_DEFERRED, *_steps(7)],
        "domain_mean": ["--policy.name", "domain_mean", *_steps(6)],
        "blade": ["--policy.name", "blade", *_steps(3), *BLADE],
        "tokens": ["--policy.name", "blade", "--weighting.unit", "token", *_steps(3), *BLADE],
        "aligned": ["--policy.name", "gradient_alignment", *_ALIGNED, *_steps(2)],
        "similarity": ["--policy.name", "similarity", *_steps(6)],
        "mixing": ["--policy.name", "validation_mixing", *_steps(2), *EVERY_WEIGHT],
        # Parameters grow by 1e8 a step: from step 2 on nothing is finite.
        "broken": ["--policy.name", "dwm", *_steps(6), *BROKEN],
    }
    for name, of_run in options.items():
        succeed(folder / name, *corpus.arguments(), *of_run)
    return [folder / name for name in options]


def _steps(count: int) -> list[str]:
    return ["--training.steps", str(count)]


def _lines(runs: list[Path]) -> list[dict[str, Any]]:
    texts = [(run / "metrics.jsonl").read_text(encoding="utf-8") for run in runs]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def test_every_key_of_metrics_is_described_and_no_other(runs: list[Path]) -> None:
    keys, _ = described()
    written: Keys = defaultdict(set)
    for line in _lines(runs):
        written[line["phase"]] |= set(line)
    others = (EVERY_LINE, WEIGHTS, TOKENS)
    phases = {name: found for name, found in keys.items() if name not in others}
    assert written == {phase: found | keys[EVERY_LINE] for phase, found in phases.items()}


def test_only_keys_marked_sometimes_are_absent_or_null(runs: list[Path]) -> None:
    keys, sometimes = described()
    missing: Keys = defaultdict(set)
    for line in _lines(runs):
        there = {name for name, value in line.items() if value is not None}
        missing[line["phase"]] |= (keys[line["phase"]] | keys[EVERY_LINE]) - there
    for phase, names in missing.items():
        assert names <= sometimes[phase], phase
    assert missing["weighting"] == sometimes["weighting"]


def test_every_column_of_weights_is_described_and_no_other(runs: list[Path]) -> None:
    keys, sometimes = described()
    tables = [pq.read_table(file) for run in runs for file in run.glob("weights/*.parquet")]
    for table in tables:
        assert set(table.column_names) == keys[WEIGHTS]
    empty = {name for table in tables for name in keys[WEIGHTS] if table[name].null_count}
    assert empty == sometimes[WEIGHTS] == {"alignment"}
    assert {s for table in tables for s in table["source"].to_pylist()} == SOURCES


def test_every_column_of_token_weights_is_described_and_no_other(runs: list[Path]) -> None:
    keys, sometimes = described()
    tables = [pq.read_table(file) for run in runs for file in run.glob("token_weights/*.parquet")]
    for table in tables:
        assert set(table.column_names) == keys[TOKENS]
    empty = {name for table in tables for name in keys[TOKENS] if table[name].null_count}
    assert empty == sometimes[TOKENS]
