"""One weighting update, from the weighted gradient of a batch.

The gradient buffers contain g(w). The hypergradient through the virtual step along g(w) says how
the weights should change (bilevel/), and the method learns from that; or it weighs the batch itself
by the alignments at uniform weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.bilevel import (
    AheadProbe,
    Hypergradient,
    Problem,
    Target,
    directions_ahead,
    hypergradient,
)
from megatron_dwm.bilevel.problem import InnerOptimizer
from megatron_dwm.bilevel.virtual_step import kept_scales
from megatron_dwm.data import Batch
from megatron_dwm.model import ForwardOutputs, PassResult, clear_gradients, forward_backward
from megatron_dwm.model.passes.objective import weighted, weighted_denominator
from megatron_dwm.runtime import Runtime
from megatron_dwm.runtime.profiling import phase
from megatron_dwm.training.learner import Learner
from megatron_dwm.training.weighed_units import WeighedUnits, weighed_units
from megatron_dwm.training.weighted_pass import weighted_pass
from megatron_dwm.weighting import Alignments, Counters, Method, WeightingUpdate
from megatron_dwm.weighting.noise import SignalToNoise, signal_to_noise

# Units that a correlation of halves needs: two always correlate.
_FEWEST_UNITS = 3


@dataclass(frozen=True, kw_only=True)
class UpperLevel:
    """The upper level of the bi-level problem in one update.

    passages: this replica's passages of the target.
    measure_noise: also compute the alignments of both halves of them, the even and the odd rows.
    estimator, inner_optimizer: as in `bilevel.*`.
    sketch_size: of the sketches of the units' steps; None: there are none.
    ahead: the direction comes first; None: after the weighted gradient.
    """

    passages: Batch
    measure_noise: bool = False
    estimator: str = "tangent_probe"
    inner_optimizer: InnerOptimizer = "adam"
    sketch_size: int | None = None
    ahead: Ahead | None = None


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """Options of an update whose direction comes before the training pass (bilevel/ahead.py).

    fraction: of the step's micro-batches that are probed; None: half of them.
    dtype: of the direction's buffer.
    """

    fraction: float | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """The result of one weighting update.

    noise: signal-to-noise of the alignments; None if it was not measured.
    units: losses at theta and weights of this replica's units, before the update.
    train_loss: mean of those losses over the global batch.
    learning_rate: eta of the virtual step.
    weighs_step: the weights are those that follow from the alignments, of the step itself.
    """

    hypergradient: Hypergradient
    noise: SignalToNoise | None
    update: WeightingUpdate
    units: WeighedUnits
    train_loss: float
    learning_rate: float
    weighs_step: bool = False

    @property
    def outputs(self) -> ForwardOutputs:
        """Losses, alignments and overlaps, as a method that weighs by them takes them."""
        sketch_nK = self.hypergradient.sketch_nK
        return ForwardOutputs(
            losses_n=self.units.losses_n,
            alignment_n=self.hypergradient.alignment_n,
            overlap_nK=None if sketch_nK is None else sketch_nK * self.learning_rate**0.5,
        )


@dataclass(frozen=True, kw_only=True)
class OwnUpdateResult:
    """The result of one update without a hypergradient.

    units: losses and weights of this replica's units. train_loss: mean of those losses over the
    global batch. val_loss, grad_norm: as in `OwnUpdate`.
    """

    units: WeighedUnits
    train_loss: float
    val_loss: float
    grad_norm: float


def weighting_update(
    learner: Learner, method: Method, train: Batch, upper: UpperLevel, counters: Counters
) -> UpdateResult | OwnUpdateResult | None:
    """Make one update on its own batch, with the LLM frozen (collective).

    Returns None, without an update, if alignments or validation loss are not finite.
    """
    with kept_scales(learner.llm):
        if method.own_updates:
            return _own_update(learner, method, train, upper.passages, counters)
        with phase("weighted gradient"):
            result = weighted_pass(learner, method, train, counters, for_update=True)
        update = update_from_gradient(learner, method, train, result, upper)
    clear_gradients(learner.llm, learner.optimizer)
    return update


def _own_update(
    learner: Learner, method: Method, train: Batch, passages: Batch, counters: Counters
) -> OwnUpdateResult | None:
    found = method.own_update(learner.llm, train, passages, counters)
    if found is None:
        return None
    units = weighed_units(train, found.losses_n, found.weights_n, learner.runtime)
    return OwnUpdateResult(
        units=units,
        train_loss=float(units.mean(units.losses_n[None], learner.runtime)[0]),
        val_loss=found.val_loss,
        grad_norm=found.grad_norm,
    )


def update_from_gradient(
    learner: Learner, method: Method, train: Batch, result: PassResult, upper: UpperLevel
) -> UpdateResult | None:
    """Make one update from g(w), which is in the gradient buffers before and after (collective).

    result: the pass that computed g(w). Returns None as `weighting_update` does.
    """
    return _learn(learner, method, train, result, _hypergradient(learner, train, result, upper))


def look_ahead(learner: Learner, upper: UpperLevel) -> AheadProbe:
    """Returns the probe for the next training pass; the gradient buffers are zero (collective)."""
    assert upper.ahead is not None
    target = Target(
        llm=learner.llm,
        optimizer=learner.optimizer,
        val_batch=upper.passages,
        micro_batch_size=learner.micro_batch_size,
        inner=upper.inner_optimizer,
    )
    with phase("hypergradient"):
        found = directions_ahead(target, upper.ahead.dtype, halves=upper.measure_noise)
    return AheadProbe(learner.llm, found, fraction=upper.ahead.fraction)


def update_from_probe(
    learner: Learner, method: Method, train: Batch, result: PassResult, probe: AheadProbe
) -> UpdateResult | None:
    """Make one update from the alignments that the training pass has computed (collective).

    Returns None as `weighting_update` does, and if no unit's alignment is known.
    """
    assert result.weights_n is not None
    differentiated_n = result.weights_n if result.relative_n is None else result.relative_n
    found = probe.hypergradient(train, differentiated_n)
    update = None
    if _is_finite_everywhere(found) and _any_is_known(found):
        update = _update_result(learner, train, result, found)
    return _learn(learner, method, train, result, update)


def _learn(
    learner: Learner, method: Method, train: Batch, result: PassResult, found: UpdateResult | None
) -> UpdateResult | None:
    if found is None:
        return None
    alignments = Alignments(
        values_n=found.hypergradient.alignment_n,
        known_n=found.hypergradient.known_n,
        learning_rate=learner.optimizer.param_groups[0]["lr"],
        signal_to_noise=None if found.noise is None else found.noise.ratio,
    )
    with phase("weighting model"):
        update = method.update(train, result.outputs, alignments)
    return _with_weights(found, update)


def align_first(learner: Learner, batch: Batch, upper: UpperLevel) -> UpdateResult | None:
    """Compute the alignments of a step's batch at uniform weights (collective).

    Returns None as `weighting_update` does. The gradient buffers are overwritten.
    """
    llm, size = learner.llm, learner.micro_batch_size
    ones_n = torch.ones(batch.units.count, device=llm.runtime.device)
    clear_gradients(llm, learner.optimizer)
    with kept_scales(llm):
        with phase("weighted gradient"):
            result = forward_backward(
                llm, weighted(batch, ones_n, size), denominator=weighted_denominator(batch)
            )
        return _hypergradient(learner, batch, replace(result, weights_n=ones_n), upper)


def weighs_step(found: UpdateResult, weights_n: Tensor) -> UpdateResult:
    """Returns the update with the weights that the method made of its alignments."""
    return replace(_with_weights(found, WeightingUpdate(weights_n)), weighs_step=True)


def _with_weights(found: UpdateResult, update: WeightingUpdate) -> UpdateResult:
    return replace(found, update=update, units=replace(found.units, weights_n=update.weights_n))


def _hypergradient(
    learner: Learner, train: Batch, result: PassResult, upper: UpperLevel
) -> UpdateResult | None:
    """Returns an update with the pass's own weights; None if it is not finite (collective)."""
    assert result.weights_n is not None
    problem = Problem(
        llm=learner.llm,
        optimizer=learner.optimizer,
        train_batch=train,
        weights_n=result.weights_n,
        val_batch=upper.passages,
        micro_batch_size=learner.micro_batch_size,
        inner=upper.inner_optimizer,
        sketch_size=upper.sketch_size,
    )
    with phase("hypergradient"):
        found = hypergradient(problem, upper.estimator, halves=upper.measure_noise)
    if not _is_finite_everywhere(found):
        return None
    return _update_result(learner, train, result, found)


def _update_result(
    learner: Learner, train: Batch, result: PassResult, found: Hypergradient
) -> UpdateResult:
    """Returns an update with the pass's own weights (collective)."""
    assert result.weights_n is not None
    units = weighed_units(train, result.unit_losses_n, result.weights_n, learner.runtime)
    return UpdateResult(
        hypergradient=found,
        noise=_noise(found, units, learner.runtime),
        update=WeightingUpdate(result.weights_n),
        units=units,
        train_loss=float(units.mean(units.losses_n[None], learner.runtime)[0]),
        learning_rate=learner.learning_rate,
    )


def _noise(found: Hypergradient, units: WeighedUnits, runtime: Runtime) -> SignalToNoise | None:
    """Compute the signal-to-noise ratio over the global batch, if halves exist (collective).

    None, too, if fewer than three units count, since two always correlate.
    A unit without a counted token, or whose alignment is not known, has 0 in both halves, which is
    no agreement.
    """
    if found.halves_2n is None:
        return None
    halves = [units.gather(half_n, runtime) for half_n in found.halves_2n]
    counts_n = torch.ones_like(halves[0], dtype=torch.bool)
    if (sizes_n := units.gathered_sizes(runtime)) is not None:
        counts_n &= sizes_n > 0
    if found.known_n is not None:
        counts_n &= units.gather(found.known_n.float(), runtime) > 0
    if int(counts_n.sum()) < _FEWEST_UNITS:
        return None
    return signal_to_noise(*(half_n[counts_n] for half_n in halves))


def _any_is_known(found: Hypergradient) -> bool:
    """True if some replica has the alignment of a unit (collective)."""
    if found.known_n is None:
        return True
    answer = found.known_n.any().to(torch.int32)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer)


def _is_finite_everywhere(found: Hypergradient) -> bool:
    """True if every replica's alignments and the validation loss are finite (collective)."""
    finite = torch.isfinite(found.alignment_n).all() & math.isfinite(found.val_loss)
    if found.sketch_nK is not None:
        finite &= torch.isfinite(found.sketch_nK).all()
    answer = finite.to(torch.int32)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer)
