"""Small configurations for tests of plans."""

from __future__ import annotations

from typing import Any

from megatron_dwm.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PolicyConfig,
    TrainingConfig,
    ValidationConfig,
    WeightingConfig,
)

MODEL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 88,
    "vocab_size": 256,
    "tied_embeddings": False,
}


def configured(
    *,
    model: dict[str, Any] | None = None,
    weighting: dict[str, Any] | None = None,
    policy: str = "uniform",
    length: int = 16,
    batch: int = 4,
    micro_batch: int = 2,
    **parallel: Any,
) -> Config:
    """Returns the run of a tiny model; keys in `model` replace those of MODEL."""
    return Config(
        parallel=ParallelConfig(**parallel),
        model=ModelConfig(**{**MODEL, **(model or {})}),
        data=DataConfig(train=["unread"], tokenizer="unread", sequence_length=length),
        validation=ValidationConfig(path="unread"),
        training=TrainingConfig(global_batch_size=batch, micro_batch_size=micro_batch),
        policy=PolicyConfig(name=policy),
        weighting=WeightingConfig(**(weighting or {})),
    )
