"""What the ranks of the tests of a softmax that is divided after the pass run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dwm.data import Batch
from megatron_dwm.model import forward_only
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.testing import weighted_gradient
from megatron_dwm.training import Ahead, UpperLevel
from megatron_dwm.training.weighted_pass import weighted_pass
from megatron_dwm.weighting.groups import gather_over_data, units_of_replicas
from tests.documents import packed_batch
from tests.subjects import Subject, with_dwm
from tests.tiny import MICRO_BATCH, Tiny, tiny

FIRST, SECOND, VALIDATION = 100, 102, 101


def weights_and_gradients(
    micro_batch: int = MICRO_BATCH,
    documents: dict[str, Any] | None = None,
    floor: float = 0.0,
    bound: float = 0.5,
    **layout: Any,
) -> dict[str, Any]:
    """Weights and gradient of a pass, and the same from a softmax over the whole batch by hand."""
    with tiny(**layout) as subject:
        trained = _trained(subject, micro_batch, floor, bound)
        trained.taken(_batch(subject, FIRST, documents))  # sets the temperature
        batch = _batch(subject, SECOND, documents)
        by_hand_n = _softmax(trained, batch, floor)
        result = weighted_pass(
            trained.learner, trained.method, batch, trained.state, for_update=False
        )
        assert result.relative_n is not None and result.weights_n is not None
        gradient = [p.main_grad.clone() for p in subject.llm.parameters()]
        mine_n = _mine(subject, batch, by_hand_n).float()
        weighted_gradient(subject.llm, subject.optimizer, batch, mine_n, micro_batch)
        expected = [p.main_grad.clone() for p in subject.llm.parameters()]
        largest = max(float(each.abs().max()) for each in expected)
        pairs = zip(gradient, expected, strict=True)
        return {
            "weights": _gathered(subject, batch, result.weights_n),
            "by hand": by_hand_n,
            "gradient error": max(float((a - b).abs().max()) for a, b in pairs) / largest,
            "temperature": float(trained.method.trainer.weigher.deferred.temperature),
        }


def _trained(subject: Tiny, micro_batch: int, floor: float, bound: float) -> Subject:
    return with_dwm(
        subject,
        micro_batch,
        encoder="llm",
        group="global",
        across_samples=False,
        uniform_floor=floor,
        min_effective_sample_size=bound,
    )


def _batch(subject: Tiny, number: int, documents: dict[str, Any] | None) -> Batch:
    if documents is None:
        return subject.batch(number)
    return packed_batch(number, subject.runtime, **documents)


def _gathered(subject: Tiny, batch: Batch, values_n: Tensor) -> Tensor:
    counts = units_of_replicas(batch, subject.runtime)
    return gather_over_data(values_n, subject.runtime, counts)


def _mine(subject: Tiny, batch: Batch, values_n: Tensor) -> Tensor:
    counts = units_of_replicas(batch, subject.runtime)
    return values_n.split(counts)[subject.runtime.data_rank]


@torch.no_grad()
def _softmax(trained: Subject, batch: Batch, floor: float) -> Tensor:
    """Returns the weights of the global batch, in double precision, at the temperature that stands.

    The logit is linear in the features: of the weighting model only its parameters are used.
    """
    runtime, llm = trained.learner.runtime, trained.learner.llm
    model, deferred = trained.method.trainer.model, trained.method.trainer.weigher.deferred
    outputs = forward_only(llm, unit(batch, MICRO_BATCH), early_layer=1).outputs
    counts = units_of_replicas(batch, runtime)
    columns = [outputs.features.final_nD, outputs.features.early_nD, outputs.losses_n[:, None]]
    final, early, loss = (gather_over_data(each, runtime, counts).double() for each in columns)
    sizes_U = batch.units.sizes_U
    if sizes_U is None:
        sizes_n = torch.ones(len(loss), dtype=torch.float64)
    else:
        sizes_n = gather_over_data(sizes_U, runtime, counts).double()
        loss = loss.where(sizes_n[:, None] > 0, 0.0)
    states = [F.rms_norm(each.float(), each.shape[-1:]).double() for each in (final, early)]
    rows = torch.cat([*states, loss], dim=1)
    project, head = model.encoder.project, model.sample_head
    pooled = rows @ project.weight.double().T + project.bias.double()
    logits_n = (pooled @ head.weight.double().T + head.bias.double())[:, 0]
    c_n = ((logits_n - deferred.reference.double()) / deferred.temperature.double()).exp()
    c_n = (1 - floor) * c_n + floor
    return c_n * sizes_n.sum() / (sizes_n * c_n).sum()


def steps(
    micro_batch: int = MICRO_BATCH, update: str = "training", **layout: Any
) -> dict[str, Tensor]:
    """Three steps, the first with an update inside: losses, weights, temperatures and drifts."""
    with tiny(**layout) as subject:
        trained = _trained(subject, micro_batch, 0.1, 0.7)
        ahead = Ahead(fraction=1.0) if update == "ahead" else None
        upper = UpperLevel(passages=subject.batch(VALIDATION), ahead=ahead)
        taken = [trained.taken(subject.batch(FIRST))]
        taken.append(trained.taken(subject.batch(FIRST + 5), upper))
        taken += [trained.taken(subject.batch(number)) for number in (SECOND, SECOND + 1)]
        of_last = taken[-1].statistics
        return {
            "losses": torch.tensor([each.loss for each in taken]),
            "weights": torch.stack([trained.gather(each.units.weights_n) for each in taken]),
            "norms": torch.tensor([each.grad_norm for each in taken]),
            "last": torch.stack([of_last[name] for name in sorted(of_last)]),
        }
