"""The config.json of a Hugging Face model, checked key by key before anything heavy is imported.

The supported classes are in architectures.py. A model with features that ours lacks (other biases,
activations or rotary embeddings, a window of attention) is refused. Cost: one read of a small file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dwm.config.architectures import ARCHITECTURES, Architecture, why_refused
from megatron_dwm.config.errors import UserError

CONFIG_NAME = "config.json"
# Constants of Megatron-Core's Llama 3 scaling, which has no options for them.
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_REFUSED = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
"""keys of config.json, each with the values that our model supports"""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig:
    """The contents of a config.json, under the names of model.LlamaShape.

    context_tokens: longest sequence that the model supports (max_position_embeddings).
    """

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    rotary_base: float
    norm_epsilon: float
    init_std: float
    head_dim: int | None
    rope_scaling_factor: float | None
    qk_layernorm: bool
    add_qkv_bias: bool
    context_tokens: int


def read_huggingface_config(directory: Path) -> HuggingFaceConfig:
    """Read the config.json in `directory`; raises `UserError` if it is not supported."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{directory}: not a Hugging Face model directory (no {CONFIG_NAME})")
    return check_huggingface_config(read_json_object(path), path)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a model; raises `UserError` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; the model is damaged")
    return content


def check_huggingface_config(config: Mapping[str, Any], path: Path) -> HuggingFaceConfig:
    """Check `config`, read from `path`; raises `UserError` with the key that is not supported."""
    architecture = architecture_of(config, path)
    config = {**architecture.absent, **config}
    for key, allowed in _REFUSED.items():
        if key == "attention_bias" and architecture.add_qkv_bias:
            continue  # its class does not read the key
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{path}: {key} {config[key]!r} is not supported; only {allowed[0]!r} is"
            )
    heads = _whole_number(config, "num_attention_heads", path)
    width = _whole_number(config, "hidden_size", path)
    groups = _whole_number(config, "num_key_value_heads", path, default=heads)
    if heads % groups:
        raise UserError(
            f"{path}: num_key_value_heads {groups} does not divide num_attention_heads {heads}"
        )
    head_dim = _whole_number(config, "head_dim", path, default=width // heads)
    base, scaling = _rotary(config, path)
    context = _whole_number(config, "max_position_embeddings", path, default=2048)
    window = attention_window(config, path)
    if window is not None and window < context:
        raise UserError(
            f"{path}: sliding_window {window} is smaller than the context of {context} tokens "
            "(max_position_embeddings); a sliding window is not supported"
        )
    return HuggingFaceConfig(
        hidden_size=width,
        num_layers=_whole_number(config, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=_whole_number(config, "intermediate_size", path),
        vocab_size=_whole_number(config, "vocab_size", path),
        tied_embeddings=_truth(config, "tie_word_embeddings", path),
        rotary_base=base,
        norm_epsilon=_positive(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", path),
        init_std=_positive(config.get("initializer_range", 0.02), "initializer_range", path),
        head_dim=None if head_dim * heads == width else head_dim,
        rope_scaling_factor=scaling,
        qk_layernorm=architecture.qk_layernorm,
        add_qkv_bias=architecture.add_qkv_bias,
        context_tokens=context,
    )


def architecture_of(config: Mapping[str, Any], path: Path) -> Architecture:
    """Returns the class that `config`, read from `path`, names; raises `UserError` for others."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(f"{path}: {why_refused(model_type)}")
    return ARCHITECTURES[model_type]


def attention_window(config: Mapping[str, Any], path: Path) -> int | None:
    """Returns the tokens that attention reaches back in some layer; None for the whole context."""
    architecture = architecture_of(config, path)
    config = {**architecture.absent, **config}
    # Qwen has a switch for the window, and Llama's class does not read the key.
    is_on = architecture.model_type == "mistral" or _truth(config, "use_sliding_window", path)
    if not is_on or architecture.model_type == "llama" or config.get("sliding_window") is None:
        return None
    return _whole_number(config, "sliding_window", path)


def _rotary(config: Mapping[str, Any], path: Path) -> tuple[float, float | None]:
    """Returns the base and the factor of Llama 3's scaling, from keys old and new.

    Transformers 5 has `rope_parameters`; earlier releases have `rope_theta` and `rope_scaling`.
    """
    rope = {**_object(config, "rope_scaling", path), **_object(config, "rope_parameters", path)}
    named = [rope.get("rope_theta"), config.get("rope_theta")]
    base = next((value for value in named if value is not None), 10000.0)
    base = _positive(base, "rope_theta", path)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise UserError(f"{path}: a partial rotary embedding is not supported")
    if kind == "default":
        return base, None
    if kind != "llama3" or any(rope.get(key) != value for key, value in _LLAMA3_SCALING.items()):
        wanted = ", ".join(f"{key} {value:g}" for key, value in _LLAMA3_SCALING.items())
        raise UserError(
            f"{path}: rope scaling {rope} is not supported; only Llama 3's is, with {wanted}"
        )
    return base, _positive(rope.get("factor"), "the rope scaling's factor", path)


def _object(config: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {key} is {value!r}; expected an object or null")
    return value or {}


def _truth(config: Mapping[str, Any], key: str, path: Path) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {value!r}; expected true or false")
    return bool(value)


def _positive(value: Any, name: str, path: Path) -> float:
    # Python's JSON parser accepts NaN, Infinity and integers beyond a float's range.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1e300:
        raise UserError(f"{path}: {name} is {value!r}; expected a number above 0")
    return float(value)


def _whole_number(
    config: Mapping[str, Any], key: str, path: Path, *, default: int | None = None
) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {key} is {value!r}; expected a whole number above 0")
    return value
