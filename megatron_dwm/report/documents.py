"""The documents that a run wanted most and least, with what is known of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_dwm.report.corpus import Corpus
from megatron_dwm.report.document_scores import read_sources
from megatron_dwm.report.document_sums import DocumentSums
from megatron_dwm.report.document_texts import DocumentTexts
from megatron_dwm.report.score_correlation import Scores

Side = Literal["most", "least"]
Measure = Literal["weight", "alignment", "credit"]
# A character has at most as many bytes, and each may be a token.
_BYTES = 4
MEASURES: tuple[Measure, ...] = ("weight", "alignment", "credit")


@dataclass(frozen=True, kw_only=True)
class WantedDocument:
    """A document of a stage and its place there.

    rank: from 1, among the most or the least wanted. rows: recorded weights of it. alignment,
    credit: None if no recorded update had it. text: its beginning; None if it cannot be read.
    """

    stage: int
    side: Side
    rank: int
    document: int
    domain: str
    source: str | None
    record: int | None
    rows: int
    tokens: int
    weight: float
    alignment: float | None
    credit: float | None
    scores: dict[str, float]
    text: str | None


def most_and_least(
    sums: DocumentSums, count: int, by: Measure = "weight", among_K: np.ndarray | None = None
) -> dict[Side, np.ndarray]:
    """Returns the numbers in `sums` of the most and the least wanted documents, best first.

    among_K: True for entries that may be chosen; None: all. Those without the measure are left
    out. Equal ones are in the order of the sums. With fewer documents than twice the count no
    document is on both sides.
    """
    values = {"weight": sums.weight_K, "alignment": sums.alignment_K, "credit": sums.credit_K}[by]
    known = np.isfinite(values) if by == "weight" else sums.aligned_K > 0
    at = np.flatnonzero(known if among_K is None else known & among_K)
    upper = min(count, -(-len(at) // 2))
    lower = min(count, len(at) - upper)
    return {"most": _largest(at, -values[at], upper), "least": _largest(at, values[at], lower)}


def describe(
    sums: DocumentSums,
    chosen: dict[Side, np.ndarray],
    domains: Sequence[str],
    corpus: Corpus,
    texts: DocumentTexts,
    scores: Scores,
    max_characters: int,
) -> list[WantedDocument]:
    """Returns the chosen entries with their domains, sources, scores and clipped texts."""
    numbers = np.concatenate([chosen["most"], chosen["least"]])
    documents = np.unique(sums.document_K[numbers])
    sources, records = (column.to_pylist() for column in read_sources(corpus, documents))
    found = []
    for side, places in chosen.items():
        for rank, at in enumerate(places.tolist(), start=1):
            document, aligned = int(sums.document_K[at]), bool(sums.aligned_K[at])
            place = int(np.searchsorted(documents, document))
            found.append(
                WantedDocument(
                    stage=int(sums.stage_K[at]),
                    side=side,
                    rank=rank,
                    document=document,
                    domain=domains[sums.domain_K[at]],
                    source=sources[place],
                    record=records[place],
                    rows=int(sums.rows_K[at]),
                    tokens=int(sums.tokens_K[at]),
                    weight=float(sums.weight_K[at]),
                    alignment=float(sums.alignment_K[at]) if aligned else None,
                    credit=float(sums.credit_K[at]) if aligned else None,
                    scores=_scores_of(scores, document),
                    text=clipped(texts.of(document, _BYTES * max_characters + 1), max_characters),
                )
            )
    return found


def all_equal(wanted: Sequence[WantedDocument], by: Measure = "weight") -> bool:
    """Returns True if no document of a stage is wanted more than another.

    wanted: the most and the least wanted, so the largest and the smallest value are among them.
    """
    values = [getattr(document, by) for document in wanted]
    return len(values) > 1 and math.isclose(min(values), max(values), rel_tol=1e-9)


def clipped(text: str | None, max_characters: int) -> str | None:
    """Returns the beginning of a text, with an ellipsis if something follows."""
    if text is None or len(text) <= max_characters:
        return text
    return text[:max_characters].rstrip() + " …"


def _largest(at: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Returns the `count` entries of `at` with the smallest `order`; equal ones in their order."""
    if 0 < count < len(at):
        bound = np.partition(order, count - 1)[count - 1]
        at, order = at[order <= bound], order[order <= bound]
    return at[np.argsort(order, kind="stable")][:count]


def _scores_of(scores: Scores, document: int) -> dict[str, float]:
    values = scores.at(np.array([document]))[0].tolist()
    return {name: value for name, value in zip(scores.names, values, strict=True) if value == value}
