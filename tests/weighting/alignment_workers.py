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
from tests.bilevel.workers import (
    TRAIN,
    VALIDATION,
    _losses,
    _moments_by_name,
    _oracle,
    _textbook_step,
)
from tests.documents import packed_batch
from tests.subjects import Subject, with_method
from tests.tiny import MICRO_BATCH, SAMPLES, Tiny, tiny
from tests.weighting.unit_workers import softmax_by_hand

TEMPERATURE, BOUND = 0.8, 0.4
KEPT, REDUNDANCY = 0.5, 1.0


def _trained(
    subject: Tiny, group: str, temperature: float = TEMPERATURE, decay: float = 0.0
) -> Subject:
    method = GradientAlignment(
        PolicyConfig(alignment_temperature=temperature, alignment_decay=decay),
        WeightingConfig(group=group, min_effective_sample_size=BOUND),
        subject.runtime,
        MICRO_BATCH,
    )
    return with_method(subject, method, MICRO_BATCH)


def _greedy(subject: Tiny, group: str, redundancy: float, sketch_size: int) -> Subject:
    method = GradientAlignment(
        PolicyConfig(
            alignment_choice="greedy",
            keep_ratio=KEPT,
            redundancy=redundancy,
            sketch_size=sketch_size,
        ),
        WeightingConfig(group=group),
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


def choice_and_oracle(inner: str, redundancy: float, **layout: Any) -> dict[str, Any]:
    """Weights of a greedy choice in one process: ours, and by a plain loop in double precision.

    The loop has autograd's gradient of every sample, one by one, and autograd's derivative of the
    textbook step for J. With it: the choice without overlaps, and the smallest gap of any choice,
    relative to the spread of the alignments.
    """
    with tiny(**layout) as subject:
        trained, batch = _greedy(subject, "global", redundancy, 0), subject.batch(TRAIN)
        subject.weights_n = torch.ones(SAMPLES)
        rate = subject.optimizer.param_groups[0]["lr"]
        scores = -_oracle(subject, inner, layout.get("clip", 1.0)) * SAMPLES / rate
        updates = _updates_by_hand(subject, inner, layout.get("clip", 1.0))
        value = rate * scores
        gram = rate**2 * updates @ updates.t()
        chosen, gap = _naive_choice(value, redundancy * gram, round(KEPT * SAMPLES))
        alone, _ = _naive_choice(value, 0.0 * gram, round(KEPT * SAMPLES))
        upper = UpperLevel(
            passages=subject.batch(VALIDATION),
            inner_optimizer=inner,
            sketch_size=trained.method.sketch_size,
        )
        found = trained.taken(batch, upper)
        return {
            "ours": found.units.weights_n,
            "by hand": chosen / KEPT,
            "without overlaps": alone / KEPT,
            "gap": gap / float(value.std()),
        }


def _naive_choice(value: Tensor, gram: Tensor, count: int) -> tuple[Tensor, float]:
    """Returns the choice, 1 or 0 by sample, and the smallest lead of a choice over the next."""
    chosen: list[int] = []
    gap = float("inf")
    while len(chosen) < count:
        left = [i for i in range(len(value)) if i not in chosen]
        of_left = [float(value[i] - sum(gram[i, j] for j in chosen)) for i in left]
        ranked = sorted(of_left, reverse=True)
        gap = min(gap, ranked[0] - ranked[1])
        chosen.append(left[of_left.index(ranked[0])])
    return torch.zeros(len(value)).index_fill_(0, torch.tensor(chosen), 1.0), gap


def _updates_by_hand(subject: Tiny, inner: str, clip: float) -> Tensor:
    """Returns [n, N], J grad l_i in double precision, with J of the textbook step."""
    module, moments = subject.llm.modules[0], _moments_by_name(subject)
    rate = subject.optimizer.param_groups[0]["lr"]
    batch = subject.batch(TRAIN)
    theta = {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}
    gradients = [
        torch.autograd.grad(_losses(module, theta, batch.rows(i, i + 1))[0], list(theta.values()))
        for i in range(batch.size)
    ]
    mean = [torch.stack(each).mean(dim=0) for each in zip(*gradients, strict=True)]
    norm = float(torch.sqrt(sum(g.square().sum() for g in mean)))
    factor = clip / (norm + 1e-6) if clip and norm > clip else 1.0
    columns = []
    for number, (name, g) in enumerate(zip(theta, mean, strict=True)):
        at = (factor * g).requires_grad_()
        stepped = _textbook_step(torch.zeros_like(g), at, moments[name], rate, inner)
        [slope] = torch.autograd.grad(stepped.sum(), at)
        jacobian = -factor * slope / rate
        columns.append(torch.stack([(jacobian * each[number]).flatten() for each in gradients]))
    return torch.cat(columns, dim=1)


def choices(unit: str, group: str, sketch_size: int, **layout: Any) -> dict[str, Tensor]:
    """Weights of a greedy choice, and the largest overlap of two units beside an alignment."""
    with tiny(**layout) as subject:
        trained, runtime = _greedy(subject, group, REDUNDANCY, sketch_size), subject.runtime
        batch, passages = (_batch(subject, unit, number) for number in (TRAIN, VALIDATION))
        upper = UpperLevel(passages=passages, sketch_size=trained.method.sketch_size)
        found = trained.taken(batch, upper)
        counts = units_of_replicas(batch, runtime)
        return {"weights": gather_over_data(found.units.weights_n, runtime, counts)}


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


def running(unit: str, group: str, decay: float, **layout: Any) -> list[dict[str, Any]]:
    """Three steps with running moments; the method is saved, built anew and loaded before each.

    For each: alignments and weights of all units, their sizes, and the moments after it.
    """
    found, state = [], None
    with tiny(**layout) as subject:
        runtime = subject.runtime
        for number in range(3):
            trained = _trained(subject, group, decay=decay)
            if state is not None:
                trained.method.load_state_dict(state)
            batch, passages = _batch(subject, unit, TRAIN + number), _batch(subject, unit, 7)
            taken = trained.taken(batch, UpperLevel(passages=passages))
            assert taken.update is not None
            counts, sizes_U = units_of_replicas(batch, runtime), batch.units.sizes_U
            sizes_U = torch.ones(batch.units.count) if sizes_U is None else sizes_U
            state = trained.method.state_dict()
            columns = {
                "alignments": taken.update.hypergradient.alignment_n,
                "weights": taken.units.weights_n,
                "sizes": sizes_U,
            }
            gathered = {n: gather_over_data(v, runtime, counts) for n, v in columns.items()}
            found.append({**gathered, "moments": state["moments"]})
    return found


def parameters_after_a_step(temperature: float | None) -> tuple[Tensor, Tensor]:
    """Weights and parameters after a step; without alignments if there is no temperature."""
    with tiny() as subject:
        trained = _trained(subject, "global", temperature or TEMPERATURE)
        upper = UpperLevel(passages=subject.batch(VALIDATION))
        taken = trained.taken(subject.batch(TRAIN), upper if temperature else None)
        flat = torch.cat([p.detach().flatten() for p in subject.llm.parameters()])
        return taken.units.weights_n, flat
