"""From configuration to policy. A new policy is one file and a line in POLICIES and in PARTS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.model import LlamaShape
from megatron_dwm.runtime import Runtime
from megatron_dwm.weighting.domain_mean import DomainMeanPolicy
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


def build_policy(
    config: Config,
    runtime: Runtime,
    llm: LlamaShape,
    vocab_size: int,
    *,
    tokenizer_sha256: str | None = None,
) -> Policy:
    """The policy of the run. llm: the LLM's shape. The last two are the tokenizer's."""
    shape = weighting_shape(config, llm, vocab_size, tokenizer_sha256=tokenizer_sha256)
    return POLICIES[config.policy.name](config, runtime, shape)


def weighting_shape(
    config: Config, llm: LlamaShape, vocab_size: int, *, tokenizer_sha256: str | None = None
) -> WeightingShape:
    """The weighting model that the configuration asks for.

    tokenizer_sha256: None where only sizes are wanted, and no tokenizer is at hand.
    """
    weighting = config.weighting
    return WeightingShape(
        vocab_size=vocab_size,
        hidden_size=weighting.hidden_size,
        num_layers=weighting.num_layers,
        num_attention_heads=weighting.num_attention_heads,
        ffn_hidden_size=weighting.ffn_hidden_size,
        encoder=weighting.encoder,
        feature_size=llm.hidden_size if weighting.encoder == "llm" else 0,
        tokenizer_sha256=tokenizer_sha256 if weighting.encoder == "own" else None,
    )


def _uniform(config: Config, runtime: Runtime, shape: WeightingShape) -> Policy:
    return UniformPolicy()


def _dwm(config: Config, runtime: Runtime, shape: WeightingShape) -> Policy:
    return DwmPolicy(
        _weighting_model(config, shape),
        config.weighting,
        runtime,
        config.training.micro_batch_size,
        learned=config.weighting.load is not None,
        bf16=config.model.precision != "fp32",
    )


def _domain_mean(config: Config, runtime: Runtime, shape: WeightingShape) -> Policy:
    size = config.training.micro_batch_size
    return DomainMeanPolicy(config.policy, config.weighting, runtime, size)


POLICIES: dict[str, Callable[[Config, Runtime, WeightingShape], Policy]] = {
    "uniform": _uniform,
    "dwm": _dwm,
    "domain_mean": _domain_mean,
    # The passages are in the batch (training/session.py), all at weight 1.
    "validation_mixing": _uniform,
}

# What each policy consists of; a key of another part has no effect with it (config/effect.py).
PARTS: dict[str, frozenset[Part]] = {
    "uniform": frozenset(),
    "dwm": frozenset({"target", "updates", "alignments", "weighting_model", "groups"}),
    "domain_mean": frozenset({"target", "updates", "alignments", "domain_mean", "groups"}),
    "validation_mixing": frozenset({"target", "mixing"}),
}
_OF_LEARNING: frozenset[Part] = frozenset({"target", "updates", "alignments"})


def parts_of(config: Config) -> frozenset[Part]:
    """The parts that the run uses: a frozen weighting model learns nothing."""
    parts = PARTS[config.policy.name]
    frozen = "weighting_model" in parts and config.weighting.frozen
    return parts - _OF_LEARNING if frozen else parts


def _weighting_model(config: Config, shape: WeightingShape) -> WeightingModel:
    if config.weighting.load is None:
        return build_weighting_model(shape, config.run.seed + _SEED_OFFSET)
    return load_weighting_model(Path(config.weighting.load), shape)
