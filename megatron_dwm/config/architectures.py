"""The model classes of Hugging Face that our LLM can be, and why other ones are refused.

An absent key of a config.json stands for its class's default, which differs between classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dwm.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One class of transformers, as its config.json names it.

    model_type, class_name: the keys `model_type` and `architectures`.
    qk_layernorm: a norm over each head of queries and keys. add_qkv_bias: a bias on queries, keys
        and values.
    absent: values of absent keys, where they differ from Llama's.
    """

    model_type: str
    class_name: str
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    absent: Mapping[str, Any] = field(default_factory=dict)


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}

ARCHITECTURES = {
    each.model_type: each
    for each in (
        Architecture(model_type="llama", class_name="LlamaForCausalLM"),
        Architecture(
            model_type="mistral",
            class_name="MistralForCausalLM",
            absent={
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
        ),
        Architecture(
            model_type="qwen2", class_name="Qwen2ForCausalLM", add_qkv_bias=True, absent=_QWEN
        ),
        Architecture(
            model_type="qwen3",
            class_name="Qwen3ForCausalLM",
            qk_layernorm=True,
            absent={**_QWEN, "head_dim": 128},
        ),
    )
}
"""model_type -> architecture; of two with the same layers, the first is what a new model becomes"""

_EXPERTS = "mixture of experts"
_STATE_SPACE = "state-space or recurrent layers"
_GEMMA = "norms with a scale of 1 + w, and soft caps on logits"
_OLDER = "other norms, biases, or positions"
_REASONS = {
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "deepseek_v2": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "jamba": _STATE_SPACE,
    "bamba": _STATE_SPACE,
    "nemotron_h": _STATE_SPACE,
    "qwen3_next": _STATE_SPACE,
    "recurrent_gemma": _STATE_SPACE,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _OLDER,
    "gpt_neox": _OLDER,
    "phi": _OLDER,
    "stablelm": _OLDER,
    "starcoder2": _OLDER,
    "olmo": _OLDER,
    "olmo2": _OLDER,
}


def architecture_with(*, qk_layernorm: bool, add_qkv_bias: bool) -> Architecture:
    """Returns the architecture that a model of ours with these layers is exported as.

    Raises UserError if Hugging Face has none.
    """
    wanted = (qk_layernorm, add_qkv_bias)
    for each in ARCHITECTURES.values():
        if (each.qk_layernorm, each.add_qkv_bias) == wanted:
            return each
    raise UserError(
        "a model with norms of heads and a bias on queries, keys and values has no architecture in "
        "Hugging Face's transformers that it can be exported as; convert it to Megatron-LM's form "
        "(to-megatron), or train without one of the two"
    )


def why_refused(model_type: Any) -> str:
    """Returns why a model_type cannot be converted, for a message about its config.json."""
    reason = _REASONS.get(model_type) if isinstance(model_type, str) else None
    supported = ", ".join(map(repr, ARCHITECTURES))
    return (
        f"model_type {model_type!r}{f' ({reason})' if reason else ''} is not supported; only "
        f"{supported} are (docs/huggingface.md)"
    )
