"""Which documents to take, given a score for each of them and a budget of tokens.

Documents are taken in the order of their keys, largest first, until their tokens reach the budget:
so at least the budget, and less than one document more. A key is the score itself (`top_k`), or
score / temperature + Gumbel noise. The latter is sampling without replacement with probabilities
proportional to exp(score / temperature): the order of such keys has the distribution of drawing one
document after the other, each time in proportion among those that are left (Gumbel top-k; Kool et
al. 2019). Equal keys are taken in the order of the documents.

With shares each domain has its own budget and is chosen by itself. Cost: one sort of the keys;
about 40 bytes a document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_dwm.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A score for each of D documents."""

    values_D: np.ndarray
    """float64, larger is better; finite where `eligible_D`"""
    eligible_D: np.ndarray
    """bool: documents that may be taken"""
    eligible_words: str
    """which documents these are, for messages"""


@dataclass(frozen=True, kw_only=True)
class Domains:
    """The domain of each of D documents."""

    names: tuple[str, ...]
    codes_D: np.ndarray
    """index into `names`"""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How documents are drawn by their scores."""

    tokens: int
    """the budget"""
    seed: int
    temperature: float = 1.0
    top_k: bool = False
    """True: the best scores, without noise"""
    shares: Mapping[str, float] | None = None
    """part of the budget of each domain; None: one budget for all"""


def choose(scores: Scores, tokens_D: np.ndarray, domains: Domains, draw: Draw) -> np.ndarray:
    """Returns a bool for each document: True if it is taken.

    Raises `UserError` if a budget is larger than the eligible documents of its domain.
    """
    require_enough(tokens_D, domains, draw, scores.eligible_D, scores.eligible_words)
    keys_D = keys_of(scores.values_D, draw)
    chosen_D = np.zeros(len(tokens_D), dtype=bool)
    for name, budget in _budgets(draw).items():
        candidates = np.flatnonzero(scores.eligible_D & _is_in(domains, name))
        taken = take_budget(keys_D[candidates], tokens_D[candidates], budget)
        chosen_D[candidates[taken]] = True
    return chosen_D


def require_enough(
    tokens_D: np.ndarray,
    domains: Domains,
    draw: Draw,
    eligible_D: np.ndarray | bool = True,
    eligible_words: str = "all documents",
) -> None:
    """Raise `UserError` if a budget is larger than the eligible documents of its domain.

    By default all documents are eligible, as they may be before they are scored.
    """
    for name, budget in _budgets(draw).items():
        if not budget:
            raise UserError(
                f"--domain-shares: {name} gets less than a token of --tokens {draw.tokens}; leave "
                "it out, or raise its share or --tokens"
            )
        available = int(tokens_D.sum(where=eligible_D & _is_in(domains, name)))
        if budget > available:
            raise UserError(_too_large(name, budget, available, eligible_words, draw))


def keys_of(values_D: np.ndarray, draw: Draw) -> np.ndarray:
    """The keys by which documents are taken; the noise of a document depends on seed and place."""
    if draw.top_k:
        return values_D
    noise_D = np.random.default_rng(draw.seed).gumbel(size=len(values_D))
    return values_D / draw.temperature + noise_D


def take_budget(keys_N: np.ndarray, tokens_N: np.ndarray, budget: int) -> np.ndarray:
    """Indices of the largest keys, largest first, until their tokens reach `budget`."""
    if budget == 0:
        return np.zeros(0, dtype=np.int64)
    order_N = np.argsort(-keys_N, kind="stable")
    reached_N = np.cumsum(tokens_N[order_N])
    return order_N[: np.searchsorted(reached_N, budget) + 1]


def _budgets(draw: Draw) -> dict[str | None, int]:
    """Tokens of each domain, which add up to the whole; the key None stands for all domains."""
    if draw.shares is None:
        return {None: draw.tokens}
    ends = np.cumsum(list(draw.shares.values()))
    cuts = np.rint(ends / ends[-1] * draw.tokens).astype(np.int64)
    return dict(zip(draw.shares, np.diff(cuts, prepend=0).tolist(), strict=True))


def _is_in(domains: Domains, name: str | None) -> np.ndarray | bool:
    return True if name is None else domains.codes_D == domains.names.index(name)


def _too_large(
    name: str | None, budget: int, available: int, eligible_words: str, draw: Draw
) -> str:
    if name is None:
        return (
            f"--tokens {budget}: the data has {available} in {eligible_words}; ask for at "
            "most that many"
        )
    assert draw.shares is not None
    return (
        f"--domain-shares {name}={draw.shares[name]:g}: that is {budget} tokens, but {name} has "
        f"{available} in {eligible_words}; lower its share or --tokens"
    )
