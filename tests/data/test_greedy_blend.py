"""The blend under shares that change, against a plain loop and against Megatron-Core's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from megatron.core.datasets import helpers

from megatron_dwm.config.blend import parse_blend
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data import greedy_blend as module
from megatron_dwm.data.greedy_blend import greedy_blend, number_within
from megatron_dwm.data.shares import ReadSteps, Shares, shares_of_run, shares_of_samples

STEPS, EACH = 500, 12
SCHEDULES: dict[str, tuple[str, dict[int, list[float]]]] = {
    "constant, two": ("constant", {0: [9, 1], 200: [0.5, 0.5], 201: [1, 3]}),
    "linear, two": ("linear", {0: [0.9, 0.1], 500: [0.1, 0.9]}),
    "linear, then flat": ("linear", {0: [1, 1, 1], 100: [1, 1, 8], 300: [5, 3, 2]}),
    "extreme": ("constant", {0: [0.001, 0.999], 250: [0.999, 0.001]}),
    "zero at first": ("linear", {0: [1, 0], 400: [1, 0], 500: [0, 1]}),
    "zero, three": (
        "constant",
        {0: [0.45, 0.45, 0.1], 100: [0, 1, 1], 200: [1, 0, 1], 300: [1] * 3},
    ),
    "one alone": ("constant", {0: [0.3, 0.3, 0.4], 77: [0, 0, 1], 333: [1, 2, 3]}),
    "many": ("linear", {0: [1, 2, 3, 4, 5, 6, 7, 8], 450: [8, 7, 6, 5, 4, 3, 2, 0.01]}),
}


def shares_at(name: str, step: int) -> list[float]:
    """The shares of a step, read off the schedule in plain Python."""
    interpolation, schedule = SCHEDULES[name]
    points = {at: [share / sum(row) for share in row] for at, row in schedule.items()}
    before = max(at for at in points if at <= step)
    after = min((at for at in points if at > step), default=before)
    if interpolation == "constant" or after == before:
        return points[before]
    way = (step - before) / (after - before)
    return [a + way * (b - a) for a, b in zip(points[before], points[after], strict=True)]


def shares_of(name: str, steps: int = STEPS, each: int = EACH) -> Shares:
    interpolation, schedule = SCHEDULES[name]
    prefixes = [f"p{number}" for number in range(len(schedule[0]))]
    data = DataConfig(train=prefixes, schedule=schedule, schedule_interpolation=interpolation)
    reads = ReadSteps(steps=range(steps), samples_each=each)
    return shares_of_samples(data, parse_blend(prefixes), [1] * len(prefixes), reads)


def plain_loop(shares_K: list[list[float]], sums: Callable[[int], list[float]]) -> list[int]:
    """The rule, one sample after the other. sums: the sums of shares before sample k."""
    counts, chosen = [0] * len(shares_K[0]), []
    for k, shares in enumerate(shares_K):
        deficits = [
            (total - count, -prefix)
            for prefix, (total, count) in enumerate(zip(sums(max(k, 1)), counts, strict=True))
            if shares[prefix] > 0
        ]
        chosen.append(-max(deficits)[1])
        counts[chosen[-1]] += 1
    return chosen


@pytest.mark.parametrize("name", SCHEDULES)
def test_choices_equal_a_plain_loop(name: str) -> None:
    """Sums of shares are within rounding of those by hand, and the choices are the loop's."""
    shares = shares_of(name)
    shares_K = [shares_at(name, k // EACH) for k in range(STEPS * EACH)]
    by_hand = np.concatenate([np.zeros((1, len(shares_K[0]))), np.cumsum(shares_K, axis=0)])
    sums = shares.before(np.arange(STEPS * EACH + 1))
    # Some thousand additions of numbers up to 1, to sums up to 6,000.
    assert np.abs(sums - by_hand).max() < 1e-9
    chosen = greedy_blend(shares, STEPS * EACH)
    assert chosen.tolist() == plain_loop(shares_K, lambda k: sums[k].tolist())
    without = np.array(shares_K) == 0
    assert not without[np.arange(len(chosen)), chosen].any(), "no sample where the share is 0"


@pytest.mark.parametrize("name", SCHEDULES)
def test_counts_follow_the_shares(name: str) -> None:
    """At every sample at most 1 above the sum of the shares, and a harmonic number below it."""
    shares = shares_of(name)
    prefixes = shares.shares_SP.shape[1]
    chosen = greedy_blend(shares, STEPS * EACH)
    counts = np.cumsum(np.eye(prefixes)[chosen], axis=0)
    deficits = shares.before(np.arange(1, STEPS * EACH + 1)) - counts
    harmonic = sum(1 / number for number in range(1, prefixes))
    if prefixes == 2 or shares.shares_SP.all():
        assert deficits.min() >= -1 - 1e-9
        assert deficits.max() <= harmonic + 1e-9


def test_counts_follow_shares_that_change_at_random() -> None:
    """The bound holds for any shares above 0, also if another set comes with every sample."""
    random = np.random.default_rng(5)
    for prefixes in (2, 3, 5, 9):
        rows = random.dirichlet(np.full(prefixes, 0.3), size=4000)
        rows = np.maximum(rows, 1e-12) / np.maximum(rows, 1e-12).sum(axis=1, keepdims=True)
        shares = Shares(starts_S=np.arange(4000), shares_SP=rows)
        counts = np.cumsum(np.eye(prefixes)[greedy_blend(shares, 4000)], axis=0)
        deficits = shares.before(np.arange(1, 4001)) - counts
        harmonic = sum(1 / number for number in range(1, prefixes))
        assert deficits.min() >= -1 - 1e-9 and deficits.max() <= harmonic + 1e-9


@pytest.mark.parametrize("prefixes", [3, 4, 6])
def test_shares_of_zero_leave_deficits_small(prefixes: int) -> None:
    """A prefix without a share keeps its deficit; the 2 is that of docs/blends.md, measured."""
    random = np.random.default_rng(prefixes)
    for _ in range(20):
        starts = np.concatenate([[0], np.cumsum(random.integers(1, 60, 59))])
        rows = random.dirichlet(np.ones(prefixes), 60) * (random.random((60, prefixes)) < 0.6)
        rows[rows.sum(axis=1) == 0, 0] = 1
        shares = Shares(starts_S=starts, shares_SP=rows / rows.sum(axis=1, keepdims=True))
        total = int(starts[-1]) + 50
        chosen = greedy_blend(shares, total)
        deficits = shares.before(np.arange(1, total + 1)) - np.cumsum(np.eye(prefixes)[chosen], 0)
        assert np.abs(deficits).max() < 2
        assert shares.at(np.arange(total))[np.arange(total), chosen].all()


@pytest.mark.parametrize(
    "weights",
    [
        *([0.3, 0.7], [0.61, 0.29, 0.1], [0.001, 0.999], [0.998, 0.001, 0.001], [1] * 7),
        *([1, 1e-4, 1e-5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]),
    ],
    ids=str,
)
def test_constant_shares_are_megatrons_blend(weights: list[float]) -> None:
    """Choice for choice, over many chunks, also where they forget slowly."""
    total = 300_000
    shares_P = np.array(weights, dtype=np.float64) / np.sum(weights)
    part, position = np.zeros(total, np.int16), np.zeros(total, np.int64)
    helpers.build_blending_indices(part, position, shares_P, len(weights), total, False)
    shares = Shares(starts_S=np.zeros(1, np.int64), shares_SP=shares_P[None])
    assert np.array_equal(greedy_blend(shares, total), part)
    # The same rule goes on where shares change later.
    later = Shares(
        starts_S=np.array([0, total]), shares_SP=np.stack([shares_P, np.roll(shares_P, 1)])
    )
    assert np.array_equal(greedy_blend(later, total + 5000)[:total], part)


@pytest.mark.parametrize("name", SCHEDULES)
def test_chunks_do_not_change_choices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny chunks, which forget nothing, tiny blocks, and one sample after the other."""
    shares = shares_of(name)
    whole = greedy_blend(shares, STEPS * EACH)
    prefixes = shares.shares_SP.shape[1]
    before = np.cumsum(np.eye(prefixes, dtype=int)[whole], axis=0)[np.arange(len(whole)), whole] - 1
    for chunk, block, rounds in ((32, 4096, 4), (64, 640, 1), (1024, 1024, 4)):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        monkeypatch.setattr(module, "_BLOCK", block)
        monkeypatch.setattr(module, "_ROUNDS", rounds)
        assert np.array_equal(greedy_blend(shares, STEPS * EACH), whole)
        numbers = np.zeros_like(before)
        number_within(whole, prefixes, numbers)
        assert np.array_equal(numbers, before)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_longer_run_begins_with_the_shorter_one(name: str) -> None:
    last = max(SCHEDULES[name][1])
    short = greedy_blend(shares_of(name, last + 1), (last + 1) * EACH)
    long = greedy_blend(shares_of(name, last + 900), (last + 900) * EACH)
    assert np.array_equal(long[: len(short)], short)


def test_shares_of_a_run_are_the_mean_over_its_steps() -> None:
    interpolation, schedule = SCHEDULES["linear, then flat"]
    train = ["a", "b", "c"]
    data = DataConfig(train=train, schedule=schedule, schedule_interpolation=interpolation)
    mean = np.mean([shares_at("linear, then flat", step) for step in range(STEPS)], axis=0)
    found = shares_of_run(data, parse_blend(train), [7, 8, 9], STEPS)
    assert found == pytest.approx(mean, rel=1e-12)
    assert (
        shares_of_run(DataConfig(train=["a", "b", "a"]), parse_blend(["a", "b", "a"]), [7, 8], 5)[0]
        == 14
    )


def test_updates_have_the_shares_of_their_steps() -> None:
    """Three updates before steps 0, 250 and 499: their samples have the shares of these steps."""
    interpolation, schedule = SCHEDULES["linear, two"]
    data = DataConfig(train=["a", "b"], schedule=schedule, schedule_interpolation=interpolation)
    reads = ReadSteps(steps=(0, 250, 499), samples_each=40)
    shares = shares_of_samples(data, parse_blend(["a", "b"]), [1, 1], reads)
    for place, step in enumerate(reads.steps):
        [first, last] = shares.at(np.array([40 * place, 40 * place + 39]))
        assert first.tolist() == last.tolist() == pytest.approx(shares_at("linear, two", step))
