"""The LLM: Megatron-Core's GPTModel in Llama's shape, wrapped for data parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Module, Parameter

from megatron_dwm.config import ModelConfig, ParallelConfig
from megatron_dwm.model.initialise import initialise_parameters
from megatron_dwm.model.modules import llama_block_spec
from megatron_dwm.model.shape import LlamaShape
from megatron_dwm.runtime import Runtime


@dataclass(frozen=True)
class LLM:
    """One rank's part of the LLM.

    chunks: Megatron's data-parallel wrappers, one a model chunk of this rank.
    """

    chunks: list[DistributedDataParallel]
    transformer: TransformerConfig
    shape: LlamaShape
    runtime: Runtime

    @property
    def modules(self) -> list[GPTModel]:
        """The bare models inside the wrappers."""
        return [unwrap(chunk) for chunk in self.chunks]

    def parameters(self) -> list[Parameter]:
        """Every parameter of this rank, in the wrappers' order."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]


def clear_gradients(llm: LLM, optimizer: MegatronOptimizer) -> None:
    """Before every pass: zero Megatron's gradient buffers and drop the optimiser's views of them.

    A view left in `Parameter.grad` would be added to the buffer that it views.
    """
    for chunk in llm.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def unwrap(module: Module) -> GPTModel:
    """The GPTModel inside Megatron's wrappers."""
    while not isinstance(module, GPTModel):
        module = module.module
    return module


def transformer_config(
    shape: LlamaShape, model: ModelConfig, parallel: ParallelConfig
) -> TransformerConfig:
    """Megatron-Core's configuration of the model."""
    bf16 = model.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    virtual_stages = parallel.virtual_stages if parallel.virtual_stages > 1 else None
    recompute = model.recompute == "full"
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        layernorm_epsilon=shape.norm_epsilon,
        init_method_std=shape.init_std,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual_stages,
        # With two stages both neighbours are one peer, and batched messages of the interleaved
        # schedule pair up wrongly: gradients are corrupted without an error.
        overlap_p2p_comm=virtual_stages is not None,
        batch_p2p_comm=virtual_stages is None,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bf16,
        recompute_granularity=None if model.recompute == "none" else model.recompute,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        # Losses are summed over samples; passes.py divides once, by a float denominator.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        # Freeing an output while gloo still sends it corrupts gradients silently; the interleaved
        # schedule does not wait for its sends.
        deallocate_pipeline_outputs=virtual_stages is None,
    )


def build_llm(
    shape: LlamaShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    runtime: Runtime,
    *,
    sequence_length: int,
    seed: int,
) -> LLM:
    """The LLM of this rank, initialised from `seed` alike under every layout."""
    config = transformer_config(shape, model, parallel)
    chunks = [
        _build_chunk(shape, config, parallel, runtime, number, sequence_length, seed)
        for number in range(parallel.virtual_stages)
    ]
    return LLM([_wrap(chunk, config, parallel) for chunk in chunks], config, shape, runtime)


def _build_chunk(
    shape: LlamaShape,
    config: TransformerConfig,
    parallel: ParallelConfig,
    runtime: Runtime,
    number: int,
    sequence_length: int,
    seed: int,
) -> GPTModel:
    """Model chunk `number` of this pipeline stage: chunk 0 of every stage comes before chunk 1."""
    place = number * runtime.pipeline_size + runtime.pipeline_rank
    num_chunks = parallel.virtual_stages * runtime.pipeline_size
    num_layers = shape.num_layers // num_chunks
    module = build_module(
        shape,
        config,
        num_layers,
        sequence_length=sequence_length,
        is_first=place == 0,
        is_last=place == num_chunks - 1,
        virtual_stage=number if parallel.virtual_stages > 1 else None,
    ).to(runtime.device)
    initialise_parameters(
        module,
        first_layer=place * num_layers,
        num_layers=shape.num_layers,
        init_std=shape.init_std,
        seed=seed,
        tensor_rank=runtime.tensor_rank,
        tensor_size=runtime.tensor_size,
    )
    return module


def build_module(
    shape: LlamaShape,
    config: TransformerConfig,
    num_layers: int,
    *,
    sequence_length: int,
    is_first: bool,
    is_last: bool,
    virtual_stage: int | None = None,
) -> GPTModel:
    """Megatron-Core's model with `num_layers` layers, its parameters as Megatron leaves them.

    is_first, is_last: with the input embedding; with the final norm and the output layer.
    """
    return GPTModel(
        config,
        llama_block_spec(num_layers),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=sequence_length,
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        # Its other constants are Llama 3's: see LlamaShape.rope_scaling_factor.
        rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 1.0,
        vp_stage=virtual_stage,
    )


def _wrap(
    module: GPTModel, config: TransformerConfig, parallel: ParallelConfig
) -> DistributedDataParallel:
    wrapped = Float16Module(config, module) if config.bf16 else module
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=parallel.sharded_optimizer,
        ),
        wrapped,
    )
