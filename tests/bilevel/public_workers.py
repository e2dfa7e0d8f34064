"""Megatron-Core's own GPTModel from its public local spec, mid-training, under a layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS
from megatron_dwm.bilevel.tangent_probe import tangent_probe
from megatron_dwm.config import ParallelConfig
from megatron_dwm.model import LLM, LlamaShape, resolve_shape
from megatron_dwm.model.initialize import initialize_parameters
from megatron_dwm.model.layers.local import RMSNorm
from megatron_dwm.model.llm import transformer_config
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.testing import SEQUENCE_LENGTH, TINY_MODEL, TINY_TRAINING, replica_rows
from megatron_dwm.training.optimizer import begin_at, build_optimizer, build_scheduler
from tests.bilevel.workers import TRAIN, _oracle, problem_of
from tests.tiny import MICRO_BATCH, SAMPLES, Tiny, _round_otherwise

LAYERS = 2


@contextmanager
def public(
    *,
    normalization: str = "LayerNorm",
    positions: str = "learned_absolute",
    bias: bool = True,
    qk_layernorm: bool = False,
    own_norms: bool = False,
    tied: bool = True,
    clip: float = 1.0,
    sharded: bool = False,
    rounding_seed: int | None = None,
    **layout: Any,
) -> Iterator[Tiny]:
    """A tiny GPT after four steps.

    own_norms: with our norm in place of torch's, which Megatron-Core refuses under sequence
        parallelism.
    """
    parallel = ParallelConfig(**layout, sharded_optimizer=sharded)
    shape = resolve_shape(replace(TINY_MODEL, tied_embeddings=tied, qk_layernorm=qk_layernorm))
    with bring_up(parallel, seed=1) as runtime:
        config = replace(
            transformer_config(shape, TINY_MODEL, parallel),
            normalization=normalization,
            add_bias_linear=bias,
            gated_linear_unit=False,
            activation_func=F.gelu,
        )
        spec = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization=normalization)
        block = _with_our_norms(spec, config) if own_norms else spec
        llm = _build(shape, config, block, positions, runtime, sharded)
        if rounding_seed is not None:
            _round_otherwise(llm, rounding_seed)
        training = replace(TINY_TRAINING, clip_grad=clip)
        optimizer = build_optimizer(training, llm, sharded=sharded)
        scheduler = build_scheduler(training, optimizer)
        begin_at(scheduler, 0)
        weights_n = torch.linspace(0.2, 1.8, SAMPLES)[replica_rows(runtime, SAMPLES)]
        subject = Tiny(runtime, llm, optimizer, scheduler, weights_n)
        subject.train(4)
        yield subject


def _with_our_norms(spec: ModuleSpec, config: TransformerConfig) -> TransformerBlockSubmodules:
    layer = replace(spec.submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    here = LAYERS // config.pipeline_model_parallel_size
    specs = [ModuleSpec(spec.module, params=spec.params, submodules=layer)] * here
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _build(
    shape: LlamaShape,
    config: TransformerConfig,
    spec: Any,
    positions: str,
    runtime: Runtime,
    sharded: bool,
) -> LLM:
    module = GPTModel(
        config,
        spec,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=SEQUENCE_LENGTH,
        pre_process=runtime.is_first_stage,
        post_process=runtime.is_last_stage,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type=positions,
    )
    initialize_parameters(
        module,
        first_layer=LAYERS // runtime.pipeline_size * runtime.pipeline_rank,
        num_layers=LAYERS,
        init_std=shape.init_std,
        seed=3,
        tensor_rank=runtime.tensor_rank,
        tensor_size=runtime.tensor_size,
    )
    _move_vectors(module, runtime)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=sharded
    )
    return LLM(
        chunks=[DistributedDataParallel(config, settings, module)],
        transformer=config,
        shape=shape,
        runtime=runtime,
    )


@torch.no_grad()
def _move_vectors(module: GPTModel, runtime: Runtime) -> None:
    """Move scales from 1 and biases from 0, by the same values under every layout."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            continue
        is_split = getattr(parameter, "tensor_model_parallel", False)
        parts = runtime.tensor_size if is_split else 1
        whole = torch.linspace(-0.3, 0.4, len(parameter) * parts)
        parameter.add_(whole.chunk(parts)[runtime.tensor_rank if is_split else 0])


def alignments(inner: str = "adam", **layout: Any) -> Tensor:
    """Returns the alignments of the global batch, in order, on every rank."""
    with public(**layout) as subject:
        found = ESTIMATORS["tangent_probe"](problem_of(subject, inner)).alignment_n
        parts = [torch.zeros_like(found) for _ in range(subject.runtime.data_size)]
        dist.all_gather(parts, found, group=subject.runtime.data_group)
        return torch.cat(parts)


def alignments_and_oracle(inner: str = "adam", **layout: Any) -> tuple[Tensor, Tensor]:
    """Returns dL_val(theta')/dw: ours, and autograd's through a step in double precision."""
    with public(**layout) as subject:
        oracle = _oracle(subject, inner, layout.get("clip", 1.0))
        problem = problem_of(subject, inner)
        found = ESTIMATORS["tangent_probe"](problem)
        return found.weight_gradient_n(problem), oracle


def probed_classes(**layout: Any) -> set[str]:
    """Returns the names of the classes that have parameters; the probe took all of them."""
    with public(**layout) as subject:
        subject.gradient(TRAIN)
        tangent_probe(subject.llm, unit(subject.batch(TRAIN), MICRO_BATCH))
        return {
            type(module).__name__
            for model in subject.llm.modules
            for module in model.modules()
            if any(True for _ in module.parameters(recurse=False))
        }
