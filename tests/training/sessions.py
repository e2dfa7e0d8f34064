"""A session round the tiny LLM of tests/tiny.py: no run directory, no data files."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dwm.config import Config, PolicyConfig, TrainingConfig, WeightingConfig
from megatron_dwm.training.compute import compute_of
from megatron_dwm.training.session import Session
from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.weighting import DwmPolicy, build_policy
from tests.tiny import SAMPLES, VOCAB_SIZE, Tiny


def session_of(subject: Tiny, micro_batch: int, policy: str = "dwm", **weighting: Any) -> Session:
    """A session whose weighting model, if it has one, is away from uniform weights."""
    config = Config(
        training=TrainingConfig(global_batch_size=SAMPLES, micro_batch_size=micro_batch),
        policy=PolicyConfig(name=policy),
        weighting=WeightingConfig(**weighting),
    )
    shape = subject.llm.shape
    built = build_policy(config, subject.runtime, shape, VOCAB_SIZE)
    if isinstance(built, DwmPolicy):
        generator = torch.Generator().manual_seed(1)
        for parameter in built.model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        built.learned = True
    return Session(
        config=config,
        runtime=subject.runtime,
        llm=subject.llm,
        optimizer=subject.optimizer,
        scheduler=subject.scheduler,
        policy=built,
        stages=[],
        data=None,  # type: ignore[arg-type]  # the tests hand batches over
        weighting_data=None,
        validation=None,
        evaluation=None,
        last_words=None,
        compute=compute_of(
            config,
            shape,
            built.model.shape if isinstance(built, DwmPolicy) else None,
            subject.runtime.data_size,
        ),
        state=TrainState(),
    )
