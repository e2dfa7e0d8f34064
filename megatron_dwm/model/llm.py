"""The LLM: a model of Megatron-Core in Llama's shape, wrapped for data parallelism.

Each rank holds one or more chunks of consecutive layers. The parameters start from the run's seed
in the same way under every layout (initialize.py).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Module

from megatron_dwm.config import ModelConfig, ParallelConfig
from megatron_dwm.config.printing import printable
from megatron_dwm.model.builders.blocks import BLOCKS
from megatron_dwm.model.builders.build import build_module
from megatron_dwm.model.builders.chunk import Chunk
from megatron_dwm.model.initialize import initialize_parameters
from megatron_dwm.model.layers.choice import (
    LayerChoice,
    LayerKind,
    choose_layers,
    emulated_layers,
    fp8_fields,
    parameter_dtype,
)
from megatron_dwm.model.layers.local import llama_block_spec
from megatron_dwm.model.layers.transformer_engine import transformer_engine_block_spec
from megatron_dwm.model.shape import LlamaShape
from megatron_dwm.model.wrapped import WrappedModel
from megatron_dwm.runtime import Runtime
from megatron_dwm.runtime.fused import gradient_accumulation_is_fused


@dataclass(frozen=True, kw_only=True)
class LLM(WrappedModel):
    """One rank's part of the LLM."""

    shape: LlamaShape


def transformer_config(
    shape: LlamaShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    layer_kind: LayerKind = "local",
    *,
    fused_gradients: bool = False,
) -> TransformerConfig:
    """Megatron-Core's configuration of the model.

    fused_gradients: weight gradients are added to the gradient buffers by the product itself.
    """
    dtype = parameter_dtype(model)
    virtual_stages = parallel.virtual_stages if parallel.virtual_stages > 1 else None
    recompute, blocks = model.recompute == "full", BLOCKS[model.builder]
    return TransformerConfig(
        num_layers=shape.num_layers * blocks,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        layernorm_epsilon=shape.norm_epsilon,
        init_method_std=shape.init_std,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual_stages,
        # With two stages both neighbors are one peer, and batched messages of the interleaved
        # schedule pair up wrongly: gradients are corrupted without an error.
        overlap_p2p_comm=virtual_stages is not None,
        batch_p2p_comm=virtual_stages is None,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        recompute_granularity=None if model.recompute == "none" else model.recompute,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=blocks if recompute else None,
        # Losses are summed over samples; passes/pipeline.py divides once, by a float denominator.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fused_gradients,
        masked_softmax_fusion=False,
        # SwiGLU as one kernel forward and one backward, compiled by torch. Its own backward is all
        # that the tangent probe asks of it; unroll, which asks for more, refuses these layers.
        bias_activation_fusion=layer_kind == "transformer_engine",
        bias_dropout_fusion=False,
        # Freeing an output while gloo still sends it corrupts gradients silently; the interleaved
        # schedule does not wait for its sends.
        deallocate_pipeline_outputs=virtual_stages is None,
        **_fields_of_layers(model, parallel, layer_kind),
    )


def _fields_of_layers(
    model: ModelConfig, parallel: ParallelConfig, layer_kind: LayerKind
) -> dict[str, Any]:
    """Returns the fields that depend on the layers and their precision."""
    # Megatron-Core's fused functions round the gradient of the logits to bf16.
    below_fp32 = parameter_dtype(model) == torch.bfloat16
    fields: dict[str, Any] = {
        "cross_entropy_loss_fusion": model.cross_entropy_loss_fusion and below_fp32
    }
    if layer_kind == "transformer_engine":
        fields |= fp8_fields(model)
        fields |= {
            "apply_rope_fusion": model.apply_rope_fusion,
            "tp_comm_overlap": parallel.tp_comm_overlap,
            # With it the gradient of an input is reduced inside the product for the gradient of the
            # weight, which the tangent probe leaves out.
            "tp_comm_bulk_wgrad": False,
        }
    return fields


def build_llm(
    shape: LlamaShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    runtime: Runtime,
    *,
    sequence_length: int,
    seed: int,
    trained: bool = True,
) -> LLM:
    """Build this rank's part of the LLM, with the same initial values under every layout.

    trained: with gradient buffers; without them only forward passes are possible.

    If the configured layers cannot be used, the main process prints the reason on stderr.
    """
    choice = choose_layers(model, runtime.device)
    _announce(choice, model, runtime)
    config = transformer_config(
        shape,
        model,
        parallel,
        choice.kind,
        fused_gradients=gradient_accumulation_is_fused() and choice.kind != "emulated_fp8",
    )
    chunks = []
    for number in range(parallel.virtual_stages):
        layers = _ChunkLayers.of_chunk(number, shape, parallel, runtime)
        part = Chunk(
            builder=model.builder,
            shape=shape,
            config=config,
            layers=_block_spec(shape, model, parallel, choice.kind, layers),
            sequence_length=sequence_length,
            is_first=layers.is_first,
            is_last=layers.is_last,
            virtual_stage=number if parallel.virtual_stages > 1 else None,
        )
        chunk = build_module(part).to(runtime.device)
        _initialize(chunk, shape, layers, runtime, seed)
        chunks.append(
            _wrap(chunk, config, parallel, is_first=number == 0)
            if trained
            else _frozen(chunk, config)
        )
    if trained and parallel.overlap_grad_reduce:
        # Gradients are reduced in the last micro-batch's backward pass only.
        held = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = held if len(held) > 1 else held[0]
    return LLM(
        chunks=chunks,
        transformer=config,
        shape=shape,
        runtime=runtime,
        layer_kind=choice.kind,
    )


def _announce(choice: LayerChoice, model: ModelConfig, runtime: Runtime) -> None:
    for line in (choice.message(model), choice.rope_message(model)):
        if line is not None and runtime.is_main:
            print(f"warning: {printable(line)}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _ChunkLayers:
    """The layers of the model that one chunk holds."""

    first_layer: int
    num_layers: int
    is_first: bool
    is_last: bool

    @staticmethod
    def of_chunk(
        number: int, shape: LlamaShape, parallel: ParallelConfig, runtime: Runtime
    ) -> _ChunkLayers:
        """Chunk `number` of this pipeline stage: chunk 0 of every stage comes before chunk 1."""
        index = number * runtime.pipeline_size + runtime.pipeline_rank
        num_chunks = parallel.virtual_stages * runtime.pipeline_size
        num_layers = shape.num_layers // num_chunks
        return _ChunkLayers(index * num_layers, num_layers, index == 0, index == num_chunks - 1)


def _block_spec(
    shape: LlamaShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    kind: LayerKind,
    layers: _ChunkLayers,
) -> TransformerBlockSubmodules:
    qk_layernorm = shape.qk_layernorm
    if kind == "transformer_engine":
        return transformer_engine_block_spec(
            layers.num_layers, parts_of_rows=parallel.context > 1, qk_layernorm=qk_layernorm
        )
    if kind == "local":
        return llama_block_spec(layers.num_layers, qk_layernorm=qk_layernorm)
    emulated = emulated_layers(
        model, first=layers.first_layer, count=layers.num_layers, total=shape.num_layers
    )
    return llama_block_spec(layers.num_layers, emulated, qk_layernorm=qk_layernorm)


def _initialize(
    module: LanguageModule, shape: LlamaShape, layers: _ChunkLayers, runtime: Runtime, seed: int
) -> None:
    initialize_parameters(
        module,
        first_layer=layers.first_layer,
        num_layers=shape.num_layers,
        init_std=shape.init_std,
        seed=seed,
        tensor_rank=runtime.tensor_rank,
        tensor_size=runtime.tensor_size,
    )


def whole_model(
    shape: LlamaShape, model: ModelConfig, *, sequence_length: int, **changes: Any
) -> Chunk:
    """Returns the whole model as one chunk in one process, of Megatron-Core's own layers.

    changes: to fields of Megatron-Core's configuration.
    """
    return Chunk(
        builder=model.builder,
        shape=shape,
        config=replace(transformer_config(shape, model, ParallelConfig()), **changes),
        layers=llama_block_spec(shape.num_layers, qk_layernorm=shape.qk_layernorm),
        sequence_length=sequence_length,
        is_first=True,
        is_last=True,
    )


def _frozen(module: LanguageModule, config: TransformerConfig) -> Module:
    module.requires_grad_(False)
    return Float16Module(config, module) if config.bf16 else module


def _wrap(
    module: LanguageModule,
    config: TransformerConfig,
    parallel: ParallelConfig,
    *,
    is_first: bool,
) -> DistributedDataParallel:
    """Wrap one chunk of the model. is_first: it is this rank's first one."""
    wrapped = Float16Module(config, module) if config.bf16 else module
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=parallel.grad_reduce_in_fp32,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            bucket_size=parallel.ddp_bucket_size,
            use_distributed_optimizer=parallel.sharded_optimizer,
        ),
        wrapped,
        # As in Megatron-LM: a later chunk is reduced while the backward passes of earlier ones run.
        disable_bucketing=parallel.overlap_grad_reduce and not is_first,
    )
