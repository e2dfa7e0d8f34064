"""Whose layers the LLM is made of, decided once from the configuration and the machine.

    local               Megatron-Core's own, in fp32 or bf16, on any device
    emulated_fp8        the same with FP8 products (fp8_emulation.py), on any device
    transformer_engine  NVIDIA's, in bf16 or FP8, on a GPU (transformer_engine.py)

Pure functions; nothing is built here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_dwm.config import ModelConfig
from megatron_dwm.model.layers.transformer_engine import missing_for

LayerKind = Literal["local", "emulated_fp8", "transformer_engine"]


@dataclass(frozen=True)
class LayerChoice:
    """kind: whose layers.  reason: why not those that the configuration asks for, else None."""

    kind: LayerKind
    reason: str | None = None

    def message(self, model: ModelConfig) -> str | None:
        """One line for the user; None where the choice is the expected one."""
        if self.reason is None:
            return None
        line = (
            f"model.precision {model.precision}: Megatron-Core's own layers (local) in bf16, not "
            f"Transformer Engine's: {self.reason}"
        )
        if model.precision == "fp8":
            line += "; --model.fp8_emulation true gives FP8 numerics here"
        return line


def choose_layers(model: ModelConfig, device: torch.device) -> LayerChoice:
    """The layers for `model` on `device`.

    fp8 needs Transformer Engine; bf16 takes it on a GPU. Where it cannot be used the choice is
    `local` and carries the reason.
    """
    if model.fp8_emulation:
        return LayerChoice("emulated_fp8")
    if model.precision == "fp32" or (model.precision == "bf16" and device.type != "cuda"):
        return LayerChoice("local")
    reason = missing_for(model, device)
    return LayerChoice("transformer_engine") if reason is None else LayerChoice("local", reason)


def parameter_dtype(model: ModelConfig) -> torch.dtype:
    """What the model's parameters and activations are kept in; FP8 is only multiplied in."""
    return torch.float32 if model.precision == "fp32" else torch.bfloat16


def emulated_layers(model: ModelConfig, *, first: int, count: int, total: int) -> range:
    """Which of a stage's `count` layers (from 0) multiply in emulated FP8.

    first: the model's number of the stage's layer 0; total: the model's layers.
    """
    if not model.fp8_first_last_bf16:
        return range(count)
    return range(1 if first == 0 else 0, count - 1 if first + count == total else count)


def fp8_fields(model: ModelConfig) -> dict[str, Any]:
    """Megatron-Core's TransformerConfig fields for `model.precision fp8` on Transformer Engine.

    The maxima of the delayed recipe are reduced over the tensor- and data-parallel ranks of a
    pipeline stage, which is Megatron-Core's group: every rank that holds a part or a copy of a
    tensor then quantises it with one scale; other stages hold other tensors.
    """
    if model.precision != "fp8":
        return {}
    per_tensor = model.fp8_recipe in ("delayed", "tensorwise")
    fields: dict[str, Any] = {
        # hybrid: e5m2 for output gradients, whose range one scale a tensor would not hold in e4m3.
        "fp8": "hybrid" if per_tensor else "e4m3",
        "fp8_recipe": model.fp8_recipe,
        "first_last_layers_bf16": model.fp8_first_last_bf16,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
        "tp_only_amax_red": False,
    }
    if model.fp8_recipe == "delayed":
        # Transformer Engine's own defaults; Megatron-Core's are a history of one step.
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields
