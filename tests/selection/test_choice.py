"""Which documents are taken: distributions against closed forms, budgets against sums.

All seeds are fixed, so no test can fail by chance; the thresholds are those of tests that would
fail once in ten thousand sets of seeds.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from megatron_dwm.config.errors import UserError
from megatron_dwm.selection.choice import Domains, Draw, Scores, choose, keys_of, take_budget

P_VALUE = 1e-4
SEEDS = 20_000


def scores_of(values: list[float], eligible: list[bool] | None = None) -> Scores:
    """Scores of documents that may all be taken, or those that are `eligible`."""
    return Scores(
        values_D=np.array(values, dtype=np.float64),
        eligible_D=np.array(eligible or [True] * len(values)),
        eligible_words="all documents",
    )


def one_domain(count: int) -> Domains:
    """All documents in one domain."""
    return Domains(names=("web",), codes_D=np.zeros(count, np.uint8))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_first_document_has_probability_exp_of_score(temperature: float) -> None:
    values = [0.0, 1.0, -0.5, 2.0, 0.3]
    drawn = np.zeros(len(values))
    tokens_D = np.ones(len(values), np.int64)
    for seed in range(SEEDS):
        draw = Draw(tokens=1, seed=seed, temperature=temperature)
        drawn += choose(scores_of(values), tokens_D, one_domain(len(values)), draw)
    weights = np.exp(np.array(values) / temperature)
    assert drawn.sum() == SEEDS
    assert stats.chisquare(drawn, weights / weights.sum() * SEEDS).pvalue > P_VALUE


def test_order_is_that_of_drawing_one_after_the_other() -> None:
    """All 24 orders of four documents, against sequential sampling without replacement."""
    values = np.array([0.2, -0.7, 1.1, 0.0])
    weights = np.exp(values)
    orders = list(itertools.permutations(range(4)))
    expected = []
    for order in orders:
        left, probability = weights.sum(), 1.0
        for document in order:
            probability *= weights[document] / left
            left -= weights[document]
        expected.append(probability)
    assert np.isclose(sum(expected), 1.0)
    counts = dict.fromkeys(orders, 0)
    for seed in range(SEEDS):
        keys = keys_of(values, Draw(tokens=4, seed=seed))
        counts[tuple(take_budget(keys, np.ones(4, np.int64), 4).tolist())] += 1
    found = np.array(list(counts.values()))
    assert stats.chisquare(found, np.array(expected) * SEEDS).pvalue > P_VALUE


def test_top_k_takes_the_best_and_the_first_among_equals() -> None:
    draw = Draw(tokens=25, seed=0, top_k=True)
    tokens_D = np.full(6, 10)
    chosen = choose(scores_of([1, 3, 2, 2, 2, 0]), tokens_D, one_domain(6), draw)
    assert chosen.tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize("seed", range(20))
def test_budgets_are_met_within_a_document(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tokens_D = generator.integers(0, 500, 300)
    domains = Domains(names=("a", "b", "c"), codes_D=generator.integers(0, 3, 300))
    scores = scores_of(generator.normal(size=300).tolist(), (tokens_D > 0).tolist())
    draw = Draw(tokens=9_001, seed=seed, shares={"c": 0.3, "a": 0.7})
    chosen_D = choose(scores, tokens_D, domains, draw)
    assert not chosen_D[tokens_D == 0].any()
    for code, budget in ((0, 6_301), (1, 0), (2, 2_700)):
        chosen = tokens_D[chosen_D & (domains.codes_D == code)]
        assert budget <= chosen.sum()
        assert chosen.sum() == budget == 0 or chosen.sum() - budget < chosen.max()
    whole_D = choose(scores, tokens_D, domains, Draw(tokens=9_001, seed=seed))
    assert 9_001 <= tokens_D[whole_D].sum() < 9_001 + 500


def test_everything_can_be_asked_for_and_no_more() -> None:
    tokens_D = np.array([5, 0, 7])
    scores = scores_of([0, 0, 0], [True, False, True])
    chosen = choose(scores, tokens_D, one_domain(3), Draw(tokens=12, seed=1))
    assert chosen.tolist() == [True, False, True]
    with pytest.raises(UserError, match="--tokens 13: the data has 12 in all documents"):
        choose(scores, tokens_D, one_domain(3), Draw(tokens=13, seed=1))
    with pytest.raises(UserError, match="web=1: that is 13 tokens, but web has 12"):
        choose(scores, tokens_D, one_domain(3), Draw(tokens=13, seed=1, shares={"web": 1.0}))
