"""Users' mistakes with policies that choose one by one: a line each, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_runs.fixtures import Corpus
from tests.small_runs.forked import Server

GREEDY = "--policy.name gradient_alignment --policy.alignment_choice greedy"
OPUS = "--policy.name opus --weighting.pool_batches 2"
MISTAKES = {
    "--policy.name opus": "weighting.pool_batches 1: policy opus draws a batch from several",
    f"{OPUS} --policy.score_tokens 33": (
        "policy.score_tokens 33: expected at most data.sequence_length, which is 32"
    ),
    f"{OPUS} --weighting.unit document": "weighting.unit document: expected sample with policy",
    f"{OPUS} --policy.selection_temperature -1": "policy.selection_temperature: expected a number",
    f"{OPUS} --weighting.uniform_floor 0.1": "policy opus has no softmax over a group",
    f"{GREEDY} --bilevel.estimator finite_difference": (
        "policy.redundancy 1: bilevel.estimator finite_difference forms no sketches"
    ),
    f"{GREEDY} --weighting.group micro_batch --training.micro_batch_size 1": (
        "a weighting group of one sample always weighs 1"
    ),
    f"{GREEDY} --policy.keep_ratio 0": "policy.keep_ratio: expected a number above 0",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(
    server: Server, corpus: Corpus, tmp_path: Path, mistake: str
) -> None:
    job = server.run(tmp_path / "run", [*corpus.arguments(), *mistake.split()])
    assert job.codes == [2], job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert MISTAKES[mistake] in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_overlaps_the_choice_needs_no_sketches(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    """So it works with every estimator."""
    plain = f"{GREEDY} --policy.redundancy 0 --policy.alignment_warmup 1 --training.steps 2"
    other = "--bilevel.estimator finite_difference"
    server.succeed(tmp_path / "run", [*corpus.arguments(), *plain.split(), *other.split()])
