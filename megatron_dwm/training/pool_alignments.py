"""The alignments of a pool of candidates, for a method that chooses by them (weighting/pool.py)."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.bilevel import Problem, frozen_alignments
from megatron_dwm.data import Batch
from megatron_dwm.training.learner import Learner
from megatron_dwm.training.update import UpperLevel, align_first
from megatron_dwm.weighting import PoolAlignments


def align_pool(learner: Learner, pool: Batch, passages: Batch, request: PoolAlignments) -> Tensor:
    """Returns float32 [n, 1 + K] for this replica's candidates (collective).

    Columns: the alignment, and K of overlaps if there are sketches. All are NaN if some value of an
    exact alignment is not finite. The gradient buffers are overwritten.
    """
    candidates = pool if request.tokens is None else first_tokens(pool, request.tokens)
    if request.jacobian == "exact":
        return _exact(learner, candidates, passages, request)
    problem = Problem(
        llm=learner.llm,
        optimizer=learner.optimizer,
        train_batch=candidates,
        weights_n=torch.ones(candidates.units.count, device=learner.runtime.device),
        val_batch=passages,
        micro_batch_size=learner.micro_batch_size,
        sketch_size=request.sketch_size,
    )
    found = frozen_alignments(problem)
    sketch_nK = found.sketch_nK
    overlap_nK = None if sketch_nK is None else sketch_nK * problem.learning_rate**0.5
    return _columns(found.alignment_n, overlap_nK)


def _exact(learner: Learner, pool: Batch, passages: Batch, request: PoolAlignments) -> Tensor:
    upper = UpperLevel(passages=passages, sketch_size=request.sketch_size)
    found = align_first(learner, pool, upper)
    if found is None:
        return torch.full((pool.size, 1), torch.nan, device=learner.runtime.device)
    alignment_n = found.outputs.alignment_n
    assert alignment_n is not None
    return _columns(alignment_n, found.outputs.overlap_nK)


def _columns(alignment_n: Tensor, overlap_nK: Tensor | None) -> Tensor:
    column_n1 = alignment_n[:, None]
    return column_n1 if overlap_nK is None else torch.cat([column_n1, overlap_nK], dim=1)


def first_tokens(batch: Batch, tokens: int) -> Batch:
    """Returns the rows of a batch of samples, cut after their first `tokens` tokens."""
    columns = {field.name: getattr(batch, field.name) for field in fields(batch)}
    cut: dict[str, Any] = {
        name: value[:, :tokens].contiguous()
        for name, value in columns.items()
        if name.endswith("_BS") and value is not None
    }
    return replace(batch, **cut)
