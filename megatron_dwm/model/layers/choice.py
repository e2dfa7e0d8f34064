"""Which implementation of the layers the LLM gets, from the configuration and the machine.

    local               Megatron-Core's own, in fp32 or bf16, on any device
    emulated_fp8        the same with FP8 products (fp8_emulation.py), on any device
    transformer_engine  NVIDIA's, in bf16 or FP8, on a GPU (transformer_engine.py)

Pure functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_dwm.config import ModelConfig
from megatron_dwm.model.builders.blocks import BLOCKS
from megatron_dwm.model.layers.transformer_engine import missing_for

LayerKind = Literal["local", "emulated_fp8", "transformer_engine"]


@dataclass(frozen=True)
class LayerChoice:
    """The chosen implementation.

    reason: why it is not the one that the configuration asks for; None if it is.
    """

    kind: LayerKind
    reason: str | None = None

    def message(self, model: ModelConfig) -> str | None:
        """One line for the user; None if the choice is what the configuration asks for."""
        if self.reason is None:
            return None
        line = (
            f"model.precision {model.precision}: Megatron-Core's own layers (local) in bf16, not "
            f"Transformer Engine's: {self.reason}"
        )
        if model.precision == "fp8":
            line += "; --model.fp8_emulation true gives FP8 numerics here"
        return line

    def rope_message(self, model: ModelConfig) -> str | None:
        """One line if the configuration asks for a fused rotary embedding that is not there."""
        asked = model.apply_rope_fusion and model.precision != "fp32"
        if not asked or self.kind == "transformer_engine":
            return None
        return (
            "model.apply_rope_fusion: rotary embeddings are not fused, because the kernel is for "
            f"Transformer Engine's layers and these are {self.kind}"
        )


def choose_layers(model: ModelConfig, device: torch.device) -> LayerChoice:
    """Choose the layers for `model` on `device`.

    fp8 needs Transformer Engine, and bf16 takes it on a GPU. If it cannot be used, the choice is
    `local` with the reason.
    """
    if model.fp8_emulation:
        return LayerChoice("emulated_fp8")
    if model.precision == "fp32" or (model.precision == "bf16" and device.type != "cuda"):
        return LayerChoice("local")
    reason = missing_for(model, device)
    return LayerChoice("transformer_engine") if reason is None else LayerChoice("local", reason)


def parameter_dtype(model: ModelConfig) -> torch.dtype:
    """The type of parameters and activations. FP8 is a type of products only."""
    return torch.float32 if model.precision == "fp32" else torch.bfloat16


def emulated_layers(model: ModelConfig, *, first: int, count: int, total: int) -> range:
    """Returns which of a chunk's `count` layers (from 0) multiply in emulated FP8.

    first: number of the chunk's layer 0 in the whole model; total: layers of the whole model.
    """
    if not model.fp8_first_last_bf16:
        return range(count)
    return range(1 if first == 0 else 0, count - 1 if first + count == total else count)


def fp8_fields(model: ModelConfig) -> dict[str, Any]:
    """Megatron-Core's TransformerConfig fields for `model.precision fp8` on Transformer Engine.

    The delayed recipe reduces maxima over Megatron-Core's group, the tensor-, context- and
    data-parallel ranks of a pipeline stage: every rank that holds a part or a copy of a tensor then
    quantizes it with one scale, and other stages hold other tensors.
    """
    if model.precision != "fp8":
        return {}
    blocks = BLOCKS[model.builder]
    per_tensor = model.fp8_recipe in ("delayed", "tensorwise")
    fields: dict[str, Any] = {
        # hybrid: e5m2 for output gradients, because e4m3 with one scale for a whole tensor does not
        # cover their range.
        "fp8": "hybrid" if per_tensor else "e4m3",
        "fp8_recipe": model.fp8_recipe,
        "first_last_layers_bf16": model.fp8_first_last_bf16,
        "num_layers_at_start_in_bf16": blocks,
        "num_layers_at_end_in_bf16": blocks,
        "tp_only_amax_red": False,
    }
    if model.fp8_recipe == "delayed":
        # Transformer Engine's own defaults; Megatron-Core's are a history of one step.
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields
