"""One step of the LLM: the weighted gradient, possibly a weighting update, then the optimizer.

An update on the training batch comes between the gradient and the optimizer: first g(w) at theta,
then the hypergradient through the step that follows, then that step. So theta and the moments are
those before the step, and theta' is bit-identical to the parameters after it. The updated weighting
model gives the weights from the next step on. With `weighting.update_on ahead` the direction comes
before the gradient, whose own pass then computes the alignments (bilevel/ahead.py). A method that
weighs by the batch's own alignments has its update before the weights (`Method.aligns_first`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_dwm.bilevel import AheadProbe
from megatron_dwm.data import Batch
from megatron_dwm.model import PassResult
from megatron_dwm.model.optimizer_step import step_if_finite
from megatron_dwm.runtime.profiling import phase
from megatron_dwm.training.guard import require_sound_weights
from megatron_dwm.training.learner import Learner
from megatron_dwm.training.update import (
    UpdateResult,
    UpperLevel,
    align_first,
    look_ahead,
    update_from_gradient,
    update_from_probe,
    weighs_step,
)
from megatron_dwm.training.weighed_units import WeighedUnits, weighed_units
from megatron_dwm.training.weighted_pass import weighted_pass
from megatron_dwm.weighting import Counters, Method


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A step that was taken.

    loss: mean of the units' token-mean losses over the global batch.
    units: losses and weights of this replica's units.
    update: the weighting update inside the step; None if there was none or it was not finite.
    statistics: the method's own scalars about its weights, by name, on the device.
    """

    loss: float
    weighted_loss: float
    grad_norm: float
    learning_rate: float
    units: WeighedUnits
    update: UpdateResult | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A step that was not taken, since its loss or gradient norm is not finite.

    update: the weighting update that was made inside it nevertheless; None if there was none.
    """

    loss: float
    grad_norm: float
    update: UpdateResult | None = None


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A step that was not taken, since its loss is above `limit`."""

    loss: float
    limit: float


StepOutcome = Taken | Skipped | Spike


def train_step(
    learner: Learner,
    method: Method,
    batch: Batch,
    counters: Counters,
    *,
    upper: UpperLevel | None = None,
    largest_loss: float | None = None,
) -> StepOutcome:
    """Take one optimizer step of the LLM on this replica's `batch` (collective).

    upper: make a weighting update from this step's own batch. The step itself does not change,
        unless the method weighs it by the alignments.
    largest_loss: a larger loss is a spike.

    Raises RunError for weights that are not finite, negative or of another mean than 1.
    """
    learning_rate = learner.learning_rate
    aligned, probe = None, None
    if upper is not None and method.aligns_first:
        aligned, upper = align_first(learner, batch, upper), None
    elif upper is not None and upper.ahead is not None:
        probe, upper = look_ahead(learner, upper), None
    with phase("weighted gradient"):
        result = weighted_pass(
            learner,
            method,
            batch,
            counters,
            for_update=upper is not None or probe is not None,
            aligned=None if aligned is None else aligned.outputs,
            probe=probe,
        )
    assert result.weights_n is not None
    units = _units(learner, batch, result)
    loss, weighted_loss, weight, wrong = _means(learner, units)
    if largest_loss is not None and loss > largest_loss:
        return Spike(loss=loss, limit=largest_loss)
    update = None if aligned is None else weighs_step(aligned, result.weights_n)
    grad_norm = math.nan
    if math.isfinite(loss):
        require_sound_weights(weight, wrong, method)
        if aligned is None:
            update = _update(learner, method, batch, result, probe, upper)
        with phase("optimizer step"):
            grad_norm = step_if_finite(learner.optimizer)
    learner.scheduler.step(increment=1)
    if not math.isfinite(grad_norm):
        return Skipped(loss=loss, grad_norm=grad_norm, update=update if aligned is None else None)
    _tell(method, batch, result, counters)
    return Taken(
        loss=loss,
        weighted_loss=weighted_loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        units=units,
        update=update,
        statistics=method.step_statistics(),
    )


def _units(learner: Learner, batch: Batch, result: PassResult) -> WeighedUnits:
    """Returns the units of this replica's batch after its pass (collective)."""
    assert result.weights_n is not None
    return weighed_units(
        batch,
        result.unit_losses_n,
        result.weights_n,
        learner.runtime,
        reference_losses_n=result.reference_losses_n,
    )


def _update(
    learner: Learner,
    method: Method,
    batch: Batch,
    result: PassResult,
    probe: AheadProbe | None,
    upper: UpperLevel | None,
) -> UpdateResult | None:
    """Make the update of a step after its gradient, if there is one (collective)."""
    if probe is not None:
        return update_from_probe(learner, method, batch, result, probe)
    return None if upper is None else update_from_gradient(learner, method, batch, result, upper)


def _tell(method: Method, batch: Batch, result: PassResult, counters: Counters) -> None:
    """Let the method read what a step that was taken has found (collective)."""
    if result.relative_n is not None:
        method.after_weighing(batch, result.relative_n)
    method.after_step(batch, result.unit_losses_n, counters)


def _means(learner: Learner, units: WeighedUnits) -> list[float]:
    """Returns means over the global batch (collective).

    They are those of losses, weighted losses and weights, and the fraction of weights that are not
    finite or negative.
    """
    losses_n, weights_n = units.losses_n, units.weights_n
    wrong_n = ~(torch.isfinite(weights_n) & (weights_n >= 0))
    rows = [losses_n, losses_n * weights_n, weights_n, wrong_n.to(losses_n.dtype)]
    return units.mean(torch.stack(rows), learner.runtime).tolist()
