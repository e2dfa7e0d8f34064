"""Keys of Megatron-LM or Hugging Face for what is not supported here, with the words for it.

They are no keys of ours. Without this, a user who types one would be pointed to the nearest key.
"""

from __future__ import annotations

_EXPERTS = "mixture of experts"
_STATE_SPACE = "Mamba and other state-space layers"
_OPTIMIZER = "an optimizer other than AdamW (Muon among them)"
_WINDOW = "a sliding window"
_SOFT_CAP = "a soft cap on logits"
_SCALE = "a norm with a scale of 1 + w"
_BIAS = "a bias in the MLP or after attention"
_ROTARY = "a partial rotary embedding"
_SCALING = "a rotary scaling other than that of an imported Llama 3"

_KEYS = {
    "num_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "expert_model_parallel_size": _EXPERTS,
    "expert": _EXPERTS,
    "is_hybrid_model": _STATE_SPACE,
    "hybrid_layer_pattern": _STATE_SPACE,
    "hybrid_override_pattern": _STATE_SPACE,
    "optimizer": _OPTIMIZER,
    "window_size": _WINDOW,
    "sliding_window": _WINDOW,
    "use_sliding_window": _WINDOW,
    "attn_logit_softcapping": _SOFT_CAP,
    "final_logit_softcapping": _SOFT_CAP,
    "apply_layernorm_1p": _SCALE,
    "layernorm_zero_centered_gamma": _SCALE,
    "add_bias_linear": _BIAS,
    "disable_bias_linear": _BIAS,
    "mlp_bias": _BIAS,
    "attention_bias": _BIAS,
    "rotary_percent": _ROTARY,
    "partial_rotary_factor": _ROTARY,
    "use_rope_scaling": _SCALING,
    "rope_scaling": _SCALING,
    "rope_type": _SCALING,
}
_BEGINNINGS = {"moe_": _EXPERTS, "mamba_": _STATE_SPACE, "muon_": _OPTIMIZER}


def not_supported(name: str) -> str | None:
    """Returns what a dotted key asks for, if it is known and not supported here; else None."""
    key = name.rpartition(".")[2].lower().replace("-", "_")
    begun = (what for start, what in _BEGINNINGS.items() if key.startswith(start))
    return _KEYS.get(key) or next(begun, None)
