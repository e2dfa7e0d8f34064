"""Chooses the rows that a step trains on from its pool of candidates (weighting/pool.py)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.config import RunError
from megatron_dwm.data import Batch
from megatron_dwm.runtime.profiling import phase
from megatron_dwm.training.learner import Learner
from megatron_dwm.training.pool_alignments import align_pool
from megatron_dwm.weighting import ChoosesFromPool, Counters
from megatron_dwm.weighting.groups import gather_over_data


def choose_rows(
    learner: Learner,
    method: ChoosesFromPool,
    pool: Batch,
    passages: Batch | None,
    counters: Counters,
    *,
    count: int,
) -> list[int]:
    """Returns the numbers of `count` rows of the pool of all replicas, ascending (collective).

    pool, passages: this replica's. The first rank chooses for all of them, so that scores which
    differ by rounding between ranks cannot give batches that differ. Candidates without finite
    scores are never chosen. Raises RunError if too few have them.
    """
    runtime = learner.runtime
    with phase("pool"):
        request = method.pool_alignments(counters)
        if request is None:
            scores_n = method.pool_scores(learner.llm, pool, passages, counters).detach()
        else:
            assert passages is not None
            scores_n = align_pool(learner, pool, passages, request)
    scores = gather_over_data(scores_n, runtime)
    rows = torch.full((count,), -1, dtype=torch.int64, device=runtime.device)
    if runtime.is_main:
        rows = _choice(method, scores, count, counters.step).to(rows)
    dist.broadcast(rows, src=0)
    found = rows.tolist()
    if found[0] == -2:
        raise RunError(
            f"step {counters.step + 1}: {type(method).__name__}.choose did not return {count} "
            "different candidates of its pool"
        )
    if found[0] < 0:
        raise RunError(
            f"step {counters.step + 1}: fewer than {count} of the {len(scores)} candidates of its "
            "pool have finite scores; continue from the last checkpoint (--run.resume true), and "
            "look at the weighting model and the LLM if it happens again"
        )
    return found


def _choice(method: ChoosesFromPool, scores: Tensor, count: int, step: int) -> Tensor:
    """Returns the rows, ascending.

    -1 in all places if too few candidates have finite scores, -2 if `choose` gave other than
    `count` different ones.
    """
    rows = torch.isfinite(scores.view(len(scores), -1)).all(dim=1).nonzero().flatten()
    if len(rows) < count:
        return rows.new_full((count,), -1)
    chosen = rows[method.choose(scores[rows], count, step)].sort().values
    if len(chosen) != count or len(chosen.unique()) != count:
        return rows.new_full((count,), -2)
    return chosen
