"""Intervals, tests and their words, against scipy's and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_rel

from examples.study import texts
from examples.study.contrasts import order_kept
from examples.study.outcome import Curve, Outcome
from examples.study.questions import Check
from examples.study.statistics import Difference, at_equal_work, difference, holm, p_value
from examples.study.tables import shown
from tests.small_runs.fixtures import REPOSITORY


def test_intervals_are_students() -> None:
    """Against scipy's own test of pairs."""
    draw = np.random.default_rng(3)
    ours, theirs = draw.normal(1.0, 0.5, 5), draw.normal(1.2, 0.5, 5)
    found = difference(list(ours), list(theirs))
    interval = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    for bound in (-0.4, 0.0, 0.03):
        expected = ttest_1samp(ours - theirs, bound).pvalue
        assert p_value(found, bound) == pytest.approx(expected)
    alone = difference([1.0], [3.0])
    assert alone.mean == alone.low == alone.high == -2.0 and math.isnan(alone.half_width)


def test_few_seeds_have_no_interval() -> None:
    assert shown(difference([1.0], [3.0])) == "-2.000"
    assert shown(Difference(mean=-0.2, half_width=0.001, pairs=2)) == "-0.200"
    assert shown(Difference(mean=-0.2, half_width=0.1, pairs=3)) == "**-0.200 ± 0.100**"
    assert shown(Difference(mean=-0.2, half_width=0.3, pairs=3)) == "-0.200 ± 0.300"


def test_holms_method() -> None:
    """By hand: 0.005 <= 0.05 / 4, 0.01 <= 0.05 / 3, 0.03 > 0.05 / 2, and the rest falls with it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([0.04]) == [True] and holm([]) == []


@pytest.mark.parametrize(
    ("fields", "mean", "words", "bound"),
    [
        ({"between": [None, 0]}, -0.2, "below 0", 0.0),
        ({"between": [None, 0]}, 0.2, "below 0", 0.0),
        ({"between": [-0.03, None]}, 0.2, "above -0.03", -0.03),
        ({"between": [-0.2, -0.1]}, 0.4, "from -0.2 to -0.1", -0.1),
        ({"alike": True}, 0.01, "within 0.03 of 0", 0.03),
    ],
)
def test_what_decides_a_verdict(
    fields: dict[str, object], mean: float, words: str, bound: float
) -> None:
    """The p is that of the bound next to the interval, or of the nearer of two around it."""
    check = Check(contrast="a - b", **fields)  # type: ignore[arg-type]
    found = Difference(mean=mean, half_width=0.01, pairs=4)
    assert check.verdict(found) is not None and check.expected == words
    assert check.p_value(found) == p_value(found, bound) < 0.05
    assert check.p_value(Difference(mean=mean, half_width=9.0, pairs=4)) == 1.0
    assert Check(contrast="a - b").expected == ""


def test_the_order_of_weights() -> None:
    """Spearman's correlation of three domains, of which two change places: by hand 0.5."""
    weights = {
        "a": [9.0, 1.0, 1.1],
        "b": [0.0, 0.5, 0.2],
        "c": [1.0, 0.3, 0.3],
        "d": [1.0, None, 2],
    }
    curve = Curve(step=[1, 2, 3], flops=[0, 0, 0], by_domain=weights)
    numbers = dict.fromkeys(("flops", "flops_updates", "seconds", "sample_size"), 1.0)
    outcome = Outcome(
        run="", settings="", commit="", losses=curve, weights=curve, signal_to_noise=None, **numbers
    )
    assert order_kept(0.4)(outcome) == pytest.approx(0.5)


def test_uniform_at_another_amount_of_work() -> None:
    """Exact where the loss falls with the logarithm of work; unknown outside."""
    work = [1e12, 1.25e12, 2e12]
    known = [(flops, 4.0 - 0.3 * math.log(flops)) for flops in reversed(work)]
    assert at_equal_work(1.6e12, known) == pytest.approx(4.0 - 0.3 * math.log(1.6e12))
    assert at_equal_work(5e12, known) is None and at_equal_work(1e11, known) is None


def test_the_page_says_of_what_the_text_is(tmp_path: Path) -> None:
    """Parts of the training text, by bytes, and passages of the held-out text."""
    page = " ".join((REPOSITORY / "docs" / "study.md").read_text().split())
    texts.write_training_text(tmp_path / "text.jsonl")
    texts.write_held_out(tmp_path / "heldout.jsonl")
    sizes: dict[str, int] = {}
    for record in map(json.loads, (tmp_path / "text.jsonl").open()):
        size = len(record["text"].encode())
        sizes[record["domain"]] = sizes.get(record["domain"], 0) + size
    parts = {name: 100 * size / sum(sizes.values()) for name, size in sizes.items()}
    assert (
        f"{parts['speeches']:.0f} % speeches, {parts['python']:.0f} % python, "
        f"{parts['web']:.0f} % web, {parts['austen']:.0f} % one novel (Pride and Prejudice, label "
        f"`austen`) and {parts['github']:.1f} % github"
    ) in page
    held_out = [json.loads(line)["domain"] for line in (tmp_path / "heldout.jsonl").open()]
    counts = [held_out.count(name) for name in set(held_out)]
    assert f"A domain has {min(counts)} to {max(counts)} passages" in page
