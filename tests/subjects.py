"""A learner and a method round the tiny LLM of tests/tiny.py: no run directory, no data files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config, PolicyConfig, TrainingConfig, WeightingConfig
from megatron_dwm.data import Batch
from megatron_dwm.training import (
    Learner,
    StepOutcome,
    Taken,
    UpdateResult,
    UpperLevel,
    train_step,
    weighting_update,
)
from megatron_dwm.weighting import Method
from megatron_dwm.weighting.dwm import Dwm
from megatron_dwm.weighting.groups import gather_over_data
from megatron_dwm.weighting.model import WeightingShape, build_weighting_model
from megatron_dwm.weighting.trainer import WeightingTrainer
from tests.tiny import SAMPLES, VOCAB_SIZE, Tiny


@dataclass(frozen=True)
class Subject:
    """What a test trains."""

    learner: Learner
    method: Method
    state: TrainState

    def step(self, batch: Batch, upper: UpperLevel | None = None) -> StepOutcome:
        """The product's own step, on this replica's rows."""
        return train_step(self.learner, self.method, batch, self.state, upper=upper)

    def taken(self, batch: Batch, upper: UpperLevel | None = None) -> Taken:
        """A step that is taken."""
        outcome = self.step(batch, upper)
        assert isinstance(outcome, Taken)
        return outcome

    def update(self, batch: Batch, upper: UpperLevel) -> UpdateResult:
        """The product's own update, on this replica's rows."""
        found = weighting_update(self.learner, self.method, batch, upper, self.state)
        assert found is not None
        return found

    def gather(self, values_n: Tensor) -> Tensor:
        """Values of every replica's samples."""
        return gather_over_data(values_n, self.learner.runtime)


def learner_of(tiny: Tiny, micro_batch: int) -> Learner:
    """The tiny LLM with micro-batches of this size."""
    return Learner(
        llm=tiny.llm,
        optimizer=tiny.optimizer,
        scheduler=tiny.scheduler,
        micro_batch_size=micro_batch,
    )


def with_method(tiny: Tiny, method: Method, micro_batch: int) -> Subject:
    """The tiny LLM with any method."""
    return Subject(learner_of(tiny, micro_batch), method, TrainState())


def config_of(micro_batch: int, policy: str = "dwm", **weighting: Any) -> Config:
    """A configuration that fits the tiny LLM."""
    return Config(
        training=TrainingConfig(global_batch_size=SAMPLES, micro_batch_size=micro_batch),
        policy=PolicyConfig(name=policy),
        weighting=WeightingConfig(**weighting),
    )


def with_dwm(tiny: Tiny, micro_batch: int, **weighting: Any) -> Subject:
    """The tiny LLM with a weighting model that is away from uniform weights."""
    config = WeightingConfig(**weighting)
    shape = WeightingShape(
        vocab_size=VOCAB_SIZE,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        encoder=config.encoder,
        across_samples=config.across_samples,
        feature_size=tiny.llm.shape.hidden_size if config.encoder == "llm" else 0,
    )
    model = build_weighting_model(shape, seed=1234 + 7919)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    trainer = WeightingTrainer(model, config, tiny.runtime, micro_batch, learned=True)
    return with_method(tiny, Dwm(trainer), micro_batch)
