"""FLOPs of a run's steps and updates, so that methods can be compared at equal compute.

The formulas follow model/flops.py. A run reports what it has spent (`Costs.spent`), and the planner
computes in advance what it will spend, from the same record.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

from megatron_dwm.config import Config
from megatron_dwm.data.document_counts import WHOLE_ROWS, DocumentCounts
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.flops import FORWARD_BACKWARD, llm_forward_flops
from megatron_dwm.model.passes.micro_batches import probed_micro_batches
from megatron_dwm.weighting.model import WeightingShape
from megatron_dwm.weighting.noise import why_no_noise

UpdateOn: TypeAlias = Literal["fresh", "training", "ahead"]
"""the values of `weighting.update_on`"""


class Spent(Protocol):
    """Counters of a run: steps, batches that a weighting model weighed, updates."""

    step: int
    weighings: int
    updates: int


@dataclass(frozen=True, kw_only=True)
class Costs:
    """FLOPs by part, without evaluation.

    llm_step: forward and backward of one global batch.
    weighing: the weighting model on one batch, once it has learned.
    extra_forward: the LLM's extra forward pass that must finish before a batch has weights.
    first_forward: such a pass of the first batch that has weights, alone. If its loss is not finite
        the next batch is read first, too, which is not counted.
    pool_passes: the LLM's passes over the pool of a step, from which its batch is chosen.
    pool_scores: the method's own part of scoring a pool.
    first_pool, pool_interval: the first step (from 0) with scores, and from one to the next.
    update_passes: the LLM's passes of one weighting update.
    learning: the weighting model's own part of one update.
    noise: one measurement of signal-to-noise, made in every `noise_interval`-th update (0: none).
    reference: the reference model's forward pass over one batch.
    """

    llm_step: float
    weighing: float = 0.0
    extra_forward: float = 0.0
    first_forward: float = 0.0
    pool_passes: float = 0.0
    pool_scores: float = 0.0
    first_pool: int = 0
    pool_interval: int = 1
    update_passes: float = 0.0
    learning: float = 0.0
    noise: float = 0.0
    noise_interval: int = 0
    reference: float = 0.0

    @property
    def forward(self) -> float:
        """One forward pass of the LLM over a global batch."""
        return self.llm_step / FORWARD_BACKWARD

    @property
    def update(self) -> float:
        """One weighting update, without noise and without weighing a fresh batch."""
        return self.learning + self.update_passes

    def spent(self, counters: Spent) -> float:
        """Returns the FLOPs of a run so far."""
        steps = counters.step * self.llm_step
        return steps + self.spent_on_weights(counters) + self.spent_on_updates(counters)

    def totals(self, counters: Spent) -> list[float]:
        """Returns the FLOPs of a run so far, and of those the ones of weights and of updates."""
        weights, updates = self.spent_on_weights(counters), self.spent_on_updates(counters)
        return [self.spent(counters), weights, updates]

    def spent_on_weights(self, counters: Spent) -> float:
        """Returns the FLOPs so far of choosing and weighing the batches of steps."""
        pools = self.pools(counters.step) * (self.pool_passes + self.pool_scores)
        first = self.first_forward if counters.weighings else 0.0
        weighing = self.weighing + self.reference + self.extra_forward
        return pools + counters.weighings * weighing + first

    def spent_on_updates(self, counters: Spent) -> float:
        """Returns the FLOPs so far of weighting updates, measurements of noise included."""
        noise = self.measurements(counters.updates) * self.noise
        return counters.updates * self.update + noise

    def pools(self, steps: int) -> int:
        """Returns how many pools are scored in the first `steps` steps."""
        return max(-(-(steps - self.first_pool) // self.pool_interval), 0)

    def measurements(self, updates: int) -> int:
        """Returns how often noise is measured in `updates` updates: first, then every interval."""
        return -(-updates // self.noise_interval) if self.noise_interval else 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What costs depend on besides the configuration.

    replicas: data-parallel copies of the LLM.
    passages: number in a validation batch; None for the configured one.
    documents: those of the training data; passages count as if they were like them.
    reference: shape of the reference model; None: that of the LLM.
    """

    replicas: int
    passages: int | None = None
    documents: DocumentCounts = WHOLE_ROWS
    reference: LlamaShape | None = None


def plain_costs(config: Config, llm: LlamaShape, workload: Workload) -> Costs:
    """Returns the costs of plain training."""
    return Costs(llm_step=FORWARD_BACKWARD * _forward(config, llm, workload.documents))


def reading_costs(config: Config, llm: LlamaShape, workload: Workload) -> Costs:
    """Returns the costs of a method whose weights need the forward pass of their whole group.

    A group of several micro-batches needs an extra forward pass before it has weights.
    """
    costs, training = plain_costs(config, llm, workload), config.training
    rows = training.global_batch_size // workload.replicas
    waits = config.weighting.group == "global" and rows > training.micro_batch_size
    return replace(costs, extra_forward=costs.forward) if waits else costs


def learning_costs(
    config: Config,
    llm: LlamaShape,
    workload: Workload,
    *,
    update_on: UpdateOn,
    model: WeightingShape | None = None,
    extra_forward: bool = False,
    encodes_twice: bool = False,
    frozen: bool = False,
) -> Costs:
    """Returns the costs of a method that reads alignments.

    update_on: where an update finds its batch and its direction; only `fresh` has a pass of its own
        for g(w), and `ahead` has none but the validation batch's.
    model: the weighting model, if there is one.
    extra_forward: weights need a forward pass of the whole batch first.
    encodes_twice: an update runs the weighting model forward twice (weighting/encoding.py).
    frozen: the method makes no updates.
    """
    rows, length = config.training.global_batch_size, config.data.sequence_length
    documents = workload.documents
    forward = _forward(config, llm, documents)
    passages = config.passages if workload.passages is None else workload.passages
    weighing = 0.0
    if model is not None:
        weighing = weighting_forward_flops(model, rows, length, _group_size(config), documents)
    validation = llm_forward_flops(llm, passages, length, documents.attended_tokens)
    probe = FORWARD_BACKWARD * forward
    if update_on == "ahead":
        # One more product of a forward pass's size, where micro-batches are probed.
        probe = forward * _probed_fraction(config, workload)
    own_gradient = FORWARD_BACKWARD * forward if update_on == "fresh" else 0.0
    update_passes = FORWARD_BACKWARD * validation + probe + own_gradient
    measured = not frozen and why_no_noise(config, passages, workload.replicas) is None
    return Costs(
        llm_step=FORWARD_BACKWARD * forward,
        weighing=weighing,
        extra_forward=forward if extra_forward else 0.0,
        update_passes=0.0 if frozen else update_passes,
        learning=0.0 if frozen else (FORWARD_BACKWARD + encodes_twice) * weighing,
        noise=probe,
        noise_interval=config.bilevel.noise_interval_updates if measured else 0,
    )


def _probed_fraction(config: Config, workload: Workload) -> float:
    """Returns the fraction of a step's micro-batches that is probed, in whole ones."""
    training = config.training
    count = training.global_batch_size // (training.micro_batch_size * workload.replicas)
    return probed_micro_batches(count, config.weighting.probe_fraction) / count


def weighting_forward_flops(
    shape: WeightingShape,
    samples: int,
    sequence_length: int,
    group_size: int,
    documents: DocumentCounts = WHOLE_ROWS,
) -> float:
    """Returns the FLOPs of weighing `samples` samples of `sequence_length` tokens in groups.

    group_size: samples in a group; a sample has several units if documents are the units.
    """
    reach = sequence_length if documents.attended_tokens is None else documents.attended_tokens
    units = samples * documents.units_per_row
    width = shape.hidden_size
    layer = 4 * width * width + 3 * width * shape.ffn_hidden_size
    if shape.encoder == "own":
        tokens = samples * sequence_length
        reading = tokens * shape.num_layers * (layer + width * reach)
    else:
        reading = units * (2 * shape.feature_size + 1) * width
    group_units = group_size * documents.units_per_row
    attention = layer + 2 * width * group_units + width if shape.across_samples else 0
    across = units * (attention + width)
    return 2.0 * (reading + across)


def _forward(config: Config, llm: LlamaShape, documents: DocumentCounts) -> float:
    rows, length = config.training.global_batch_size, config.data.sequence_length
    return llm_forward_flops(llm, rows, length, documents.attended_tokens)


def _group_size(config: Config) -> int:
    training = config.training
    is_global = config.weighting.group == "global"
    return training.global_batch_size if is_global else training.micro_batch_size
