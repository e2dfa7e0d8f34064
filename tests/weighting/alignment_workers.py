"""What the ranks of the tests of weights from the batch's own alignments run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, Problem
from megatron_dwm.config import PolicyConfig, WeightingConfig
from megatron_dwm.data import Batch
from megatron_dwm.training import UpperLevel
from megatron_dwm.weighting.gradient_alignment import GradientAlignment
from megatron_dwm.weighting.groups import gather_over_data, units_of_replicas
from tests.bilevel.workers import TRAIN, VALIDATION, _oracle
from tests.documents import packed_batch
from tests.subjects import Subject, with_method
from tests.tiny import MICRO_BATCH, SAMPLES, Tiny, tiny
from tests.weighting.unit_workers import softmax_by_hand

TEMPERATURE, BOUND = 0.8, 0.4


def _trained(subject: Tiny, group: str, temperature: float = TEMPERATURE) -> Subject:
    method = GradientAlignment(
        PolicyConfig(alignment_temperature=temperature),
        WeightingConfig(group=group, min_effective_sample_size=BOUND),
        subject.runtime,
        MICRO_BATCH,
    )
    return with_method(subject, method, MICRO_BATCH)


def _batch(subject: Tiny, unit: str, number: int) -> Batch:
    if unit == "rows":
        return subject.batch(number)
    return packed_batch(number, subject.runtime, unit=unit, uncounted=0.2, equal=True)


def weights_and_oracle(group: str, inner: str, **layout: Any) -> dict[str, Tensor]:
    """Weights of a step in one process: ours, and from autograd's in double precision."""
    with tiny(**layout) as subject:
        trained, batch = _trained(subject, group), subject.batch(TRAIN)
        subject.weights_n = torch.ones(SAMPLES)
        size = SAMPLES if group == "global" else MICRO_BATCH
        # dL/dw is the alignment times a negative constant, which standardizing takes away.
        of_groups = -_oracle(subject, inner, layout.get("clip", 1.0)).view(-1, size)
        upper = UpperLevel(passages=subject.batch(VALIDATION), inner_optimizer=inner)
        found = trained.taken(batch, upper).units.weights_n
        deviations = of_groups - of_groups.mean(dim=1, keepdim=True)
        logits = deviations / deviations.square().mean(dim=1, keepdim=True).sqrt() / TEMPERATURE
        ones = torch.ones(size, dtype=torch.float64)
        by_hand = torch.cat([softmax_by_hand(row, ones, BOUND) for row in logits])
        return {"ours": found, "by hand": by_hand}


def steps(unit: str, group: str, **layout: Any) -> dict[str, Tensor]:
    """Two steps: alignments, by an estimator of their own, too; weights and losses."""
    with tiny(**layout) as subject:
        trained, runtime = _trained(subject, group), subject.runtime
        batch, passages = (_batch(subject, unit, number) for number in (TRAIN, VALIDATION))
        problem = Problem(
            llm=subject.llm,
            optimizer=subject.optimizer,
            train_batch=batch,
            weights_n=torch.ones(batch.units.count),
            val_batch=passages,
            micro_batch_size=MICRO_BATCH,
        )
        separate = ESTIMATORS["tangent_probe"](problem).alignment_n
        first = trained.taken(batch, UpperLevel(passages=passages))
        assert first.update is not None
        inside = first.update.hypergradient.alignment_n
        assert torch.equal(inside, separate)
        assert torch.equal(first.update.units.weights_n, first.units.weights_n)
        second = trained.taken(batch, UpperLevel(passages=passages))
        counts = units_of_replicas(batch, runtime)
        return {
            "alignments": gather_over_data(inside, runtime, counts),
            "weights": gather_over_data(first.units.weights_n, runtime, counts),
            "losses": torch.tensor([first.loss, first.weighted_loss, second.loss]),
        }


def parameters_after_a_step(temperature: float | None) -> tuple[Tensor, Tensor]:
    """Weights and parameters after a step; without alignments if there is no temperature."""
    with tiny() as subject:
        trained = _trained(subject, "global", temperature or TEMPERATURE)
        upper = UpperLevel(passages=subject.batch(VALIDATION))
        taken = trained.taken(subject.batch(TRAIN), upper if temperature else None)
        flat = torch.cat([p.detach().flatten() for p in subject.llm.parameters()])
        return taken.units.weights_n, flat
