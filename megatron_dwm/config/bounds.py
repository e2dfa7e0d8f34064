"""What every number of a configuration may be.

Within these bounds nothing overflows on its way through fp32, seeds fit the generators, and counts
fit the arrays that they number. They are wide: what is sensible is the user's to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MAX_COUNT = 10**9
_MAX_ROWS = 10**7
_MAX_WIDTH = 2**20
_MAX_LAYERS = 10**5
_MAX_LEARNING_RATE = 1e4
_MAX_FACTOR = 1e30
"""far from fp32's largest number, 3.4e38, so that a product still fits"""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A range of numbers, ends included unless they are open."""

    low: float
    high: float
    low_is_open: bool = False
    high_is_open: bool = False

    def hold(self, value: float) -> bool:
        """Whether the value lies in the range; NaN does not."""
        above = self.low < value if self.low_is_open else self.low <= value
        return above and (value < self.high if self.high_is_open else value <= self.high)

    def __str__(self) -> str:
        low = f"a number above {self.low:g}" if self.low_is_open else f"{self.low:g} or more"
        return f"{low}, {'below' if self.high_is_open else 'at most'} {_short(self.high)}"


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


_COUNT = Bounds(low=1, high=_MAX_COUNT)
_COUNT_OR_NONE = Bounds(low=0, high=_MAX_COUNT)
_ROWS = Bounds(low=1, high=_MAX_ROWS)
_WIDTH = Bounds(low=1, high=_MAX_WIDTH)
_LAYERS = Bounds(low=1, high=_MAX_LAYERS)
_FRACTION = Bounds(low=0.0, high=1.0, high_is_open=True)
_RATE = Bounds(low=0.0, high=_MAX_LEARNING_RATE, low_is_open=True)
_DECAY = Bounds(low=0.0, high=_MAX_LEARNING_RATE)
_FACTOR = Bounds(low=0.0, high=_MAX_FACTOR)
_EPSILON = Bounds(low=1 / _MAX_FACTOR, high=1e10)

BOUNDS: dict[str, Bounds] = {
    "run.seed": Bounds(low=0, high=2**63 - 1),
    "parallel.tensor": _WIDTH,
    "parallel.pipeline": _WIDTH,
    "parallel.virtual_stages": _LAYERS,
    "parallel.timeout_s": Bounds(low=1, high=366 * 24 * 3600),
    "model.hidden_size": _WIDTH,
    "model.num_layers": _LAYERS,
    "model.num_attention_heads": _WIDTH,
    "model.num_query_groups": _WIDTH,
    "model.ffn_hidden_size": Bounds(low=1, high=8 * _MAX_WIDTH),
    "model.vocab_size": Bounds(low=1, high=2**31 - 1),
    "model.rotary_base": Bounds(low=0.0, high=_MAX_FACTOR, low_is_open=True),
    "model.norm_epsilon": _EPSILON,
    "model.init_std": Bounds(low=0.0, high=1e10),
    "data.sequence_length": Bounds(low=1, high=2**24),
    "validation.batch_size": _ROWS,
    "evaluation.interval_steps": _COUNT,
    "training.steps": _COUNT,
    "training.global_batch_size": _ROWS,
    "training.micro_batch_size": _ROWS,
    "training.learning_rate": _RATE,
    "training.min_learning_rate_fraction": Bounds(low=0.0, high=1.0),
    "training.warmup_fraction": _FRACTION,
    "training.weight_decay": _DECAY,
    "training.clip_grad": _FACTOR,
    "training.adam_beta1": _FRACTION,
    "training.adam_beta2": _FRACTION,
    "training.adam_epsilon": _EPSILON,
    "training.checkpoint_interval_steps": _COUNT_OR_NONE,
    "training.keep_last": _COUNT_OR_NONE,
    "training.keep_every": _COUNT_OR_NONE,
    "training.max_skipped_steps": _COUNT_OR_NONE,
    "training.spike_factor": _FACTOR,
    "training.log_interval_steps": _COUNT,
    "policy.domain_decay": _FRACTION,
    "policy.domain_temperature": Bounds(low=1e-6, high=_MAX_FACTOR),
    "policy.mix_fraction": _FRACTION,
    "weighting.early_layer": _LAYERS,
    "weighting.stages": _COUNT,
    "weighting.updates_per_stage": _COUNT,
    "weighting.interval_steps": _COUNT,
    "weighting.warmup_steps": _COUNT_OR_NONE,
    "weighting.freeze_after": Bounds(low=0.0, high=1.0, low_is_open=True),
    "weighting.hidden_size": _WIDTH,
    "weighting.num_layers": _LAYERS,
    "weighting.num_attention_heads": _WIDTH,
    "weighting.ffn_hidden_size": Bounds(low=1, high=8 * _MAX_WIDTH),
    "weighting.learning_rate": _RATE,
    "weighting.weight_decay": _DECAY,
    "weighting.clip_grad": _FACTOR,
    "weighting.min_effective_sample_size": _FRACTION,
    "weighting.warn_effective_sample_size": _FRACTION,
    "weighting.uniform_floor": _FRACTION,
    "bilevel.noise_interval_updates": _COUNT_OR_NONE,
    "bilevel.min_signal_to_noise": _FACTOR,
    "logging.weights_interval_steps": _COUNT_OR_NONE,
    "profiling.first_step": _COUNT,
    "profiling.last_step": _COUNT,
}


def number_problems(config: Any) -> Iterator[str]:
    """A line for every number of a `Config` that is out of its bounds; an empty value has none."""
    for key, bounds in BOUNDS.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None and not bounds.hold(value):
            yield f"{key}: expected {bounds}, got {value}"
