"""From configuration to policy. A new policy is one file and one line in POLICIES."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_dwm.config import Config
from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.dwm import DwmPolicy
from megatron_dwm.weighting.model import (
    WeightingModel,
    WeightingShape,
    build_weighting_model,
    load_weighting_model,
)
from megatron_dwm.weighting.policy import Policy, UniformPolicy

# Keeps the weighting model's parameters apart from the LLM's under one run seed.
_SEED_OFFSET = 7919


def build_policy(config: Config, runtime: Runtime, vocab_size: int) -> Policy:
    """The policy of the run; `vocab_size` is the tokenizer's."""
    return POLICIES[config.policy.name](config, runtime, vocab_size)


def _uniform(config: Config, runtime: Runtime, vocab_size: int) -> Policy:
    return UniformPolicy()


def _dwm(config: Config, runtime: Runtime, vocab_size: int) -> Policy:
    return DwmPolicy(
        _weighting_model(config, vocab_size),
        config.weighting,
        runtime,
        config.training.micro_batch_size,
        learned=config.weighting.load is not None,
    )


POLICIES: dict[str, Callable[[Config, Runtime, int], Policy]] = {"uniform": _uniform, "dwm": _dwm}


def _weighting_model(config: Config, vocab_size: int) -> WeightingModel:
    weighting = config.weighting
    if weighting.load is None:
        shape = WeightingShape(
            vocab_size=vocab_size,
            hidden_size=weighting.hidden_size,
            num_layers=weighting.num_layers,
            num_attention_heads=weighting.num_attention_heads,
            ffn_hidden_size=weighting.ffn_hidden_size,
        )
        return build_weighting_model(shape, config.run.seed + _SEED_OFFSET)
    return load_weighting_model(Path(weighting.load), vocab_size)
