"""Llama on Megatron-Core: its shape, its layers, the part of a rank, and passes through it.

    shape.py, flops.py, llm.py, wrapped.py, initialize.py   the model
    layers/    Megatron-Core's layers, the same in emulated FP8, Transformer Engine's
    passes/    micro-batches through the pipeline schedules, their losses and features
    on_disk/   names and files of a saved model, Megatron-Core's and Hugging Face's

The suffixes of tensor names (tokens_BS, hidden_SBD) are explained in docs/METHOD.md, section 0.
"""

from megatron_dwm.model.llm import LLM, build_llm
from megatron_dwm.model.passes.forward_outputs import Features, ForwardOutputs
from megatron_dwm.model.passes.micro_batch import MicroBatch
from megatron_dwm.model.passes.pipeline import (
    PassResult,
    Weigh,
    forward_backward,
    forward_only,
)
from megatron_dwm.model.passes.units import Units
from megatron_dwm.model.shape import LlamaShape, resolve_shape
from megatron_dwm.model.wrapped import (
    WrappedModel,
    clear_gradients,
    invalidate_weight_caches,
    unwrap,
)

__all__ = [
    "LLM",
    "Features",
    "LlamaShape",
    "MicroBatch",
    "PassResult",
    "ForwardOutputs",
    "Units",
    "Weigh",
    "WrappedModel",
    "build_llm",
    "clear_gradients",
    "forward_backward",
    "forward_only",
    "invalidate_weight_caches",
    "resolve_shape",
    "unwrap",
]
