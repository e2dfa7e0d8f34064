"""Llama on Megatron-Core: shapes, modules, the model of a rank, passes through the schedules."""

from megatron_dwm.model.llm import (
    LLM,
    build_llm,
    clear_gradients,
    invalidate_weight_caches,
    unwrap,
)
from megatron_dwm.model.passes.forward_outputs import Features, ForwardOutputs
from megatron_dwm.model.passes.pipeline import (
    MicroBatch,
    PassResult,
    Weigh,
    forward_backward,
    forward_only,
)
from megatron_dwm.model.shape import LlamaShape, resolve_shape

__all__ = [
    "LLM",
    "Features",
    "LlamaShape",
    "MicroBatch",
    "PassResult",
    "ForwardOutputs",
    "Weigh",
    "build_llm",
    "clear_gradients",
    "forward_backward",
    "forward_only",
    "invalidate_weight_caches",
    "resolve_shape",
    "unwrap",
]
