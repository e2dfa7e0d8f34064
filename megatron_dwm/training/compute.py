"""What a run's steps and updates cost in FLOPs, so that methods are compared at equal compute."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dwm.config import Config
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.flops import FORWARD_BACKWARD, llm_forward_flops
from megatron_dwm.training.state import TrainState
from megatron_dwm.weighting.flops import weighting_forward_flops
from megatron_dwm.weighting.model import WeightingShape


@dataclass(frozen=True, kw_only=True)
class Compute:
    """FLOPs by part; evaluation is not training and is left out.

    llm_step: forward and backward of one global batch.
    weights_step: what weighing adds to a step, once the policy has a model that has learned.
    update: one weighting update, all of it but noise and, of a batch of its own, weighing it.
    noise: one measurement of signal-to-noise, made in every `noise_interval`-th update (0: none).
    """

    llm_step: float
    weights_step: float
    update: float
    noise: float
    noise_interval: int

    def spent(self, state: TrainState) -> float:
        """FLOPs of a run so far."""
        passes = state.step * self.llm_step + state.weighings * self.weights_step
        noise = self.measurements(state.updates) * self.noise
        return passes + state.updates * self.update + noise

    def measurements(self, updates: int) -> int:
        """Of signal-to-noise in so many updates: in the first, and in every interval-th after."""
        return -(-updates // self.noise_interval) if self.noise_interval else 0


def compute_of(
    config: Config,
    llm: LlamaShape,
    weighting: WeightingShape | None,
    data_size: int,
    *,
    target_rows: int | None = None,
) -> Compute:
    """Costs of a run on `data_size` replicas.

    weighting: the weighting model that the run has, which may be a loaded one; None without one.
    target_rows: the most that a validation batch can have; None where the target is not read.
    """
    rows, length = config.training.global_batch_size, config.data.sequence_length
    forward = llm_forward_flops(llm, rows, length)
    group = _group_size(config)
    weights = 0.0
    if weighting is not None:
        weights = weighting_forward_flops(weighting, rows, length, group)
    first = forward if reads_first(config, rows // data_size) else 0.0
    passages = config.passages if target_rows is None else min(config.passages, target_rows)
    validation = llm_forward_flops(llm, passages, length)
    probe = FORWARD_BACKWARD * forward
    again = weights if encodes_in_chunks(config, rows // data_size) else 0.0
    update = FORWARD_BACKWARD * (validation + weights) + again + probe
    if config.weighting.update_on == "fresh":
        update += FORWARD_BACKWARD * forward
    return Compute(
        llm_step=FORWARD_BACKWARD * forward,
        weights_step=weights + first,
        update=update if config.learns else 0.0,
        noise=probe,
        noise_interval=_noise_interval(config, passages),
    )


def _noise_interval(config: Config, passages: int) -> int:
    measured = config.learns and why_no_noise(config, passages) is None
    return config.bilevel.noise_interval_updates if measured else 0


def why_no_noise(config: Config, passages: int) -> str | None:
    """Why the alignments' noise cannot be measured with validation batches of `passages`; None
    where it can.
    """
    if config.bilevel.estimator == "unroll":
        return "bilevel.estimator unroll gives no alignments of halves"
    if passages < 2:
        return "it is measured between halves of the validation batch, which has one passage"
    if config.training.global_batch_size < 3:
        return "two samples always correlate: training.global_batch_size has to be 3 or more"
    return None


def _group_size(config: Config) -> int:
    training = config.training
    is_global = config.weighting.group == "global"
    return training.global_batch_size if is_global else training.micro_batch_size


def encodes_in_chunks(config: Config, local_rows: int) -> bool:
    """Whether an update's encoder goes through a rank's share of the rows in several chunks, and so
    runs forward twice (weighting/encoding.py).
    """
    share = -(-local_rows // config.parallel.model_size)
    return (
        config.policy.name == "dwm"
        and config.weighting.encoder == "own"
        and share > config.training.micro_batch_size
    )


def reads_first(config: Config, local_rows: int) -> bool:
    """Whether the weights wait for a forward pass of the whole batch (training/step.py): features
    of several micro-batches are needed before the first weight is known.
    """
    return (
        config.policy.name == "dwm"
        and config.weighting.encoder == "llm"
        and config.weighting.group == "global"
        and local_rows > config.training.micro_batch_size
    )
