"""FLOPs of a run by part, the share of weighting, and the time at a stated utilisation.

Counted by model/flops.py, weighting/flops.py and training/compute.py; recomputation is added here,
because it is work of the machine but not of the model. Utilisation is of the peak of the precision
that a part runs in. That of the weighting model is bf16 for its own encoder where the LLM's is not
fp32 (weighting/encoding.py), else fp32, which on a GPU is 10 to 30 times slower; so its share of
the time can be larger than its share of the FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config import Config
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.flops import FORWARD_BACKWARD, llm_forward_flops
from megatron_dwm.planning.hardware import Gpu
from megatron_dwm.training.compute import compute_of, encodes_in_chunks, reads_first
from megatron_dwm.training.stages import first_weighed_step, plan_stages
from megatron_dwm.weighting.model import WeightingShape


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of the whole machine a step, means over the run's steps.

    llm: forward and backward.  recompute: again, in the backward pass.
    weighing: the weighting model on the batches of steps, from its first update on, or from the
    start if it was loaded.  reading: a forward pass of the LLM that it waits for.
    updates: the LLM's passes of weighting updates.  noise: one more of them in every
    bilevel.noise_interval_updates-th update.  learning: the weighting model's own.
    weighting_precision: what the weighting model multiplies in.
    """

    llm: float
    recompute: float
    weighing: float
    reading: float
    updates: float
    noise: float
    learning: float
    num_updates: int
    weighting_precision: str

    @property
    def weighting(self) -> float:
        """What is there only for the weights."""
        return self.weighing + self.reading + self.updates + self.noise + self.learning

    @property
    def share(self) -> float:
        """Of weighting, against the plain run."""
        return self.weighting / (self.llm + self.recompute)

    def step_s(self, gpu: Gpu, gpus: int, precision: str, mfu: float) -> float:
        """Seconds of a step, the mean over the run."""
        return self._time(gpu, gpus, precision, mfu, plain=False)

    def time_share(self, gpu: Gpu, precision: str) -> float:
        """Of weighting, in time against the plain run."""
        whole, plain = (self._time(gpu, 1, precision, 1.0, plain=flag) for flag in (False, True))
        return whole / plain - 1.0

    def _time(self, gpu: Gpu, gpus: int, precision: str, mfu: float, *, plain: bool) -> float:
        llm = self.llm + self.recompute
        weighting = 0.0
        if not plain:
            llm += self.reading + self.updates + self.noise
            weighting = self.weighing + self.learning
        seconds = llm / gpu.peak_flops(precision)
        seconds += weighting / gpu.peak_flops(self.weighting_precision)
        return seconds / (gpus * mfu)


def cost_of(
    config: Config, shape: LlamaShape, weighting: WeightingShape | None, replicas: int
) -> Cost:
    """Of a run on `replicas` copies of the LLM, as the run itself will count (training/compute.py).

    weighting: None without a weighting model.
    """
    compute = compute_of(config, shape, weighting, replicas)
    rows = config.training.global_batch_size
    forward = compute.llm_step / FORWARD_BACKWARD
    reading = forward if reads_first(config, rows // replicas) else 0.0
    weights = compute.weights_step - reading
    recompute = _recompute_flops(config, shape)
    fresh = config.weighting.update_on == "fresh"
    # Of one update: the weighting model forward and backward, and forward again where it goes
    # through the samples in chunks.
    again = encodes_in_chunks(config, rows // replicas)
    learning = weights * (FORWARD_BACKWARD + again)
    validation = config.passages / rows
    passes = compute.update - learning + recompute * (1 + validation + fresh)
    stages, steps = plan_stages(config), config.training.steps
    num_updates = sum(stage.num_updates for stage in stages)
    weighed_steps = steps - first_weighed_step(config, stages)
    # A fresh batch is weighed as a step's is, but for the first that a new model learns from.
    unweighed = 1 if config.weighting.load is None else 0
    weighed_updates = max(0, num_updates - unweighed) if fresh else 0
    return Cost(
        llm=compute.llm_step,
        recompute=recompute,
        weighing=weights * weighed_steps / steps,
        reading=reading * weighed_steps / steps,
        updates=(num_updates * passes + weighed_updates * reading) / steps,
        noise=compute.measurements(num_updates) * (compute.noise + recompute) / steps,
        learning=(num_updates * learning + weighed_updates * weights) / steps,
        num_updates=num_updates,
        weighting_precision=_weighting_precision(config),
    )


def _weighting_precision(config: Config) -> str:
    in_bf16 = config.weighting.encoder == "own" and config.model.precision != "fp32"
    return "bf16" if in_bf16 else "fp32"


def _recompute_flops(config: Config, shape: LlamaShape) -> float:
    """Forward FLOPs that the backward pass of one step repeats."""
    rows, length = config.training.global_batch_size, config.data.sequence_length
    attention = 2.0 * rows * length * shape.num_layers * shape.num_attention_heads
    attention *= shape.head_size * length
    output = 2.0 * rows * length * shape.padded_vocab_size * shape.hidden_size
    layers = llm_forward_flops(shape, rows, length) - output
    return {"none": 0.0, "selective": attention, "full": layers}[config.model.recompute]
