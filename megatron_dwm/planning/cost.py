"""FLOPs of a run by part, the share of weighting, and the time at a stated utilization.

model/flops.py and weighting/costs.py count the FLOPs. Recomputation is added here, because it is
work of the machine but not of the model. Utilization is a fraction of the peak of the precision
that a part runs in. The weighting model's own encoder runs in bf16 if the LLM is not in fp32
(weighting/encoding.py). Everything else of the weighting model runs in fp32, which on a GPU is 10
to 30 times slower, so its share of the time can be larger than its share of the FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config import Config
from megatron_dwm.data.document_counts import DocumentCounts
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.flops import llm_forward_flops
from megatron_dwm.planning.hardware import Gpu
from megatron_dwm.weighting import learns, method_class
from megatron_dwm.weighting.costs import Workload


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs a step of the whole machine, as means over the run's steps.

    llm: forward and backward passes.
    recompute: forward work that the backward pass repeats.
    weighing: the weighting model on the batches of steps, from its first update on, or from the
        start if it was loaded.
    reference: the reference model's forward pass over those batches, at the LLM's precision.
    reading: the LLM's forward pass that the weights wait for.
    pool_passes: the LLM's passes over the pools that batches are chosen from.
    pool_scores: the method's own part of scoring them.
    updates: the LLM's passes of weighting updates.
    noise: one more such pass in every bilevel.noise_interval_updates-th update.
    learning: the weighting model's own part of updates.
    num_updates: weighting updates of the whole run.
    weighting_precision: the precision of the weighting model's products.
    """

    llm: float
    recompute: float
    weighing: float
    reference: float
    reading: float
    pool_passes: float
    pool_scores: float
    updates: float
    noise: float
    learning: float
    num_updates: int
    weighting_precision: str

    @property
    def weighting(self) -> float:
        """FLOPs a step that plain training does not have."""
        of_pools = self.pool_passes + self.pool_scores
        of_batches = self.weighing + self.reference + self.reading
        return of_pools + of_batches + self.updates + self.noise + self.learning

    @property
    def total(self) -> float:
        """FLOPs a step of everything."""
        return self.llm + self.recompute + self.weighting

    @property
    def share(self) -> float:
        """FLOPs of weighting as a fraction of the plain run's."""
        return self.weighting / (self.llm + self.recompute)

    def step_s(self, gpu: Gpu, gpus: int, precision: str, mfu: float) -> float:
        """Returns the mean seconds of a step. mfu: fraction of the peak that is reached."""
        return self._time(gpu, gpus, precision, mfu, plain=False)

    def time_share(self, gpu: Gpu, precision: str) -> float:
        """Returns the time of weighting as a fraction of the plain run's."""
        whole, plain = (self._time(gpu, 1, precision, 1.0, plain=flag) for flag in (False, True))
        return whole / plain - 1.0

    def _time(self, gpu: Gpu, gpus: int, precision: str, mfu: float, *, plain: bool) -> float:
        llm = self.llm + self.recompute
        weighting = 0.0
        if not plain:
            llm += self.reading + self.reference + self.pool_passes + self.updates + self.noise
            weighting = self.weighing + self.pool_scores + self.learning
        seconds = llm / gpu.peak_flops(precision)
        seconds += weighting / gpu.peak_flops(self.weighting_precision)
        return seconds / (gpus * mfu)


def cost_of(config: Config, shape: LlamaShape, workload: Workload) -> Cost:
    """Returns the cost of a run, counted as the run counts it."""
    method = method_class(config)
    costs, schedule = method.costs(config, shape, workload), method.schedule(config)
    steps, num_updates = config.training.steps, schedule.num_updates
    recompute = _recompute_flops(config, shape, workload.documents)
    # A forward pass alone repeats nothing.
    repeats = costs.update_passes / costs.llm_step if learns(config) else 0.0
    if method.own_updates:
        repeats = 1 + config.passages / config.training.global_batch_size
    elif schedule.ahead:  # the probe is part of the step's own pass
        repeats = config.passages / config.training.global_batch_size
    passes = costs.update_passes + recompute * repeats
    noise = costs.noise if schedule.ahead else costs.noise + recompute
    first_weighed = method.first_weighed_step(config)
    # A fresh batch is weighed like a step's, except the first one that a new model learns from.
    # An update of the method's own has its scores among its passes.
    unweighed = 1 if first_weighed > 0 else 0
    weighs_again = schedule.fresh and not method.own_updates
    weighed_updates = max(0, num_updates - unweighed) if weighs_again else 0
    weighed = (steps - first_weighed) / steps
    first_forward = costs.first_forward if weighed else 0.0
    return Cost(
        llm=costs.llm_step,
        recompute=recompute,
        weighing=costs.weighing * weighed,
        reference=costs.reference * weighed,
        reading=costs.extra_forward * weighed + first_forward / steps,
        pool_passes=costs.pool_passes * costs.pools(steps) / steps,
        pool_scores=costs.pool_scores * costs.pools(steps) / steps,
        updates=(num_updates * passes + weighed_updates * costs.extra_forward) / steps,
        noise=costs.measurements(num_updates) * noise / steps,
        learning=(num_updates * costs.learning + weighed_updates * costs.weighing) / steps,
        num_updates=num_updates,
        weighting_precision=_weighting_precision(config),
    )


def _weighting_precision(config: Config) -> str:
    in_bf16 = config.weighting.encoder == "own" and config.model.precision != "fp32"
    return "bf16" if in_bf16 else "fp32"


def _recompute_flops(config: Config, shape: LlamaShape, documents: DocumentCounts) -> float:
    """Returns the forward FLOPs that the backward pass of one step repeats."""
    rows, length = config.training.global_batch_size, config.data.sequence_length
    attention = 2.0 * rows * length * shape.num_layers * shape.num_attention_heads
    reach = length if documents.attended_tokens is None else documents.attended_tokens
    attention *= shape.head_size * reach
    output = 2.0 * rows * length * shape.padded_vocab_size * shape.hidden_size
    layers = llm_forward_flops(shape, rows, length, documents.attended_tokens) - output
    return {"none": 0.0, "selective": attention, "full": layers}[config.model.recompute]
