"""Methods that choose what a step trains on from a pool of candidates.

With `weighting.pool_batches` m, step k reads the samples k m B to (k + 1) m B - 1 of the run's
order, with B samples in a global batch. The method gives every candidate a score, the scores of all
replicas are gathered, and B rows are chosen. The step then trains on these as on any other batch.
Which samples a step reads depends only on its number, so a run resumes without a cursor.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM
from megatron_dwm.weighting.method import Counters, Method


@dataclass(frozen=True, kw_only=True)
class PoolAlignments:
    """How to compute the alignments of a pool.

    jacobian: exact: through a virtual step along the pool's gradient (bilevel/hypergradient.py);
        frozen: with the moments and at the parameters that stand (bilevel/frozen.py).
    sketch_size: of the sketches of the candidates' steps; None: there are none.
    tokens: read the first tokens of every candidate, this many; None: all.
    """

    jacobian: Literal["exact", "frozen"]
    sketch_size: int | None = None
    tokens: int | None = None


class ChoosesFromPool(Method):
    """A method that may read a pool of candidates in every step."""

    reads_passages: ClassVar[bool] = False
    """True: `pool_scores` gets the passages of a validation batch, whose number is the step's"""

    @classmethod
    def pool_batches(cls, config: Config) -> int:
        """Returns `weighting.pool_batches`."""
        return config.weighting.pool_batches

    def pool_alignments(self, counters: Counters) -> PoolAlignments | None:
        """Returns how the scores of the next pool are its alignments; None for `pool_scores`.

        Rows of scores are then [1 + K]: a candidate's alignment, and its row of overlaps
        (`ForwardOutputs.overlap_nK`) if there are sketches.
        """
        return None

    @abstractmethod
    def pool_scores(
        self, llm: LLM, pool: Batch, passages: Batch | None, counters: Counters
    ) -> Tensor:
        """Returns float32 [n, ...], one row for each of this replica's candidates (collective).

        The ranks of a replica return the same. Gradient buffers may be used; the step clears them.
        pool: this replica's candidates, `pool_batches` times its rows of a global batch.
        passages: this replica's; None unless `reads_passages`.
        """
        ...

    def choose(self, scores: Tensor, count: int, step: int) -> Tensor:
        """Returns int64 [count], different rows of `scores`: here those with the largest scores.

        scores: [P, ...], of all replicas in the pool's order, finite; P is at least `count`.
        count: samples in a global batch. step: number of the step, from 0.
        """
        order_P = scores.argsort(descending=True, stable=True)
        return order_P[:count]
