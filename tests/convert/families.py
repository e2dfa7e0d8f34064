"""Random models of the supported classes, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 1000  # padded to 1024

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2: untied, full": {"num_key_value_heads": 4},
    "full, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "smollm2: grouped, tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama3: grouped, untied, scaled rope, own head width": {
        "rope_parameters": _LLAMA3_ROPE,
        "max_position_embeddings": 131072,
        "head_dim": 24,
    },
    "mistral: grouped, untied": {"model_type": "mistral", "sliding_window": None},
    "mistral: a window as long as the context, own head width": {
        "model_type": "mistral",
        "sliding_window": 256,
        "head_dim": 24,
        "rms_norm_eps": 1e-5,
    },
    "qwen2: bias, grouped, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2: bias, full, untied": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen3: head norms, own head width, tied": {
        "model_type": "qwen3",
        "head_dim": 24,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen3: head norms, untied": {"model_type": "qwen3", "head_dim": 16},
}


def write_llama(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    model_type: str = "llama",
    **changes: Any,
) -> Path:
    """Write a model with large random parameters, so that a swapped row shows; returns its path."""
    torch.manual_seed(0)
    defaults = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **{**defaults, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # zero at first, so that nobody would miss it
                parameter.normal_()
            elif parameter.dim() == 1:  # scales of 1 everywhere could be exchanged unnoticed
                parameter.uniform_(0.3, 1.7)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
