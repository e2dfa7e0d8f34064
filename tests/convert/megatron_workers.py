"""Checkpoints in the form of Megatron-LM's, saved by megatron-core's own code path."""

from __future__ import annotations

import argparse
import enum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dwm.config import ModelConfig, ParallelConfig
from megatron_dwm.model import build_llm
from megatron_dwm.run.starting_point import load_model, shape_of_model
from megatron_dwm.runtime import Runtime, bring_up

VOCAB, LENGTH = 360, 16
# As in Megatron-LM, to a multiple of 128 times the tensor-parallel size.
SIZES = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
}
# Names that Transformer Engine's layers give their fused norms, as its spec maps them.
FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class Backend(enum.Enum):
    """An object among the arguments, as Megatron-LM has several."""

    flash = 1


def text() -> Tensor:
    """Returns int64 [2, LENGTH]."""
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def save(
    folder: str,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    with_arguments: bool = True,
    **options: Any,
) -> Tensor:
    """Save a model under `folder`, with optimizer and arguments; returns its logits [2, S, V].

    Logits are of one process; several return an empty tensor. options: of `_built`.
    """
    with bring_up(ParallelConfig(tensor=tensor, pipeline=pipeline), seed=1) as runtime:
        model = _built(runtime, **options)
        with torch.no_grad():  # norms and biases that do something
            for number, parameter in enumerate(model.parameters()):
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.sin(torch.arange(len(parameter)) + number)
        config = model.config
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        adam = OptimizerConfig(optimizer="adam", lr=1e-3)
        optimizer = get_megatron_optimizer(adam, [wrapped], use_gloo_process_groups=False)
        sharded = model.sharded_state_dict()
        state = {
            **({"args": _arguments(model)} if with_arguments else {}),
            **{"iteration": 7, "checkpoint_version": 3.0},
            "model": sharded,
            "optimizer": optimizer.sharded_state_dict({"model": sharded}),
        }
        target = Path(folder) / "iter_0000007"
        if runtime.is_main:
            target.mkdir(parents=True)
            (Path(folder) / "latest_checkpointed_iteration.txt").write_text("7")
        runtime.barrier()
        dist_checkpointing.save(state, str(target))
        return _logits(model) if runtime.world_size == 1 else torch.empty(0)


def load(folder: str, *, tensor: int = 1, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """Load a folder into Megatron's own model; returns its logits and the saved arguments.

    Logits are those of this rank's rows of the vocabulary.
    """
    with bring_up(ParallelConfig(tensor=tensor), seed=2) as runtime:
        model = _built(runtime, fused=True, **options)
        iteration = int((Path(folder) / "latest_checkpointed_iteration.txt").read_text())
        target = str(Path(folder) / f"iter_{iteration:07d}")
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, target)
        model.load_state_dict(state["model"])
        return _logits(model), vars(dist_checkpointing.load_common_state_dict(target)["args"])


def parameters_of_ranks(theirs: str, ours: str, **layout: int) -> list[tuple[str, bool]]:
    """Returns for each parameter of this rank if both sources give it the same values.

    theirs: a folder of Megatron-LM; ours: the checkpoint that was made of it.
    """
    with bring_up(ParallelConfig(**layout), seed=2) as runtime:
        shape = shape_of_model(Path(theirs), "theirs")
        found = []
        for source in (theirs, ours):
            llm = build_llm(
                *(shape, ModelConfig(), ParallelConfig(**layout), runtime),
                sequence_length=LENGTH,
                seed=5,
            )
            load_model(llm, Path(source))
            found.append([(n, p) for m in llm.modules for n, p in m.named_parameters()])
        return [(name, torch.equal(a, b)) for (name, a), (_, b) in zip(*found, strict=True)]


def _built(
    runtime: Runtime, *, fused: bool = False, tied: bool = False, **options: Any
) -> GPTModel:
    """Returns GPTModel with Megatron-Core's own layers.

    fused: names of norms as Megatron-LM has them. options: qk_layernorm, add_qkv_bias.
    """
    config = TransformerConfig(
        **SIZES,
        **options,
        tensor_model_parallel_size=runtime.tensor_size,
        pipeline_model_parallel_size=runtime.pipeline_size,
        pipeline_dtype=torch.float32,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        layernorm_epsilon=1e-6,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.sharded_state_dict_keys_map = dict(FUSED) if fused else {}
    multiple = 128 * runtime.tensor_size
    return GPTModel(
        config,
        layer,
        vocab_size=-(-VOCAB // multiple) * multiple,
        max_sequence_length=LENGTH,
        pre_process=runtime.is_first_stage,
        post_process=runtime.is_last_stage,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        rotary_base=50000,
    )


@torch.no_grad()
def _logits(model: GPTModel) -> Tensor:
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
    return model(text(), positions, mask)


def _arguments(model: GPTModel) -> argparse.Namespace:
    config = model.config
    return argparse.Namespace(
        **SIZES,
        group_query_attention=True,
        kv_channels=config.kv_channels,
        padded_vocab_size=model.vocab_size,
        vocab_size=VOCAB,
        untie_embeddings_and_output_weights=not model.share_embeddings_and_output_weights,
        rotary_base=50000,
        rotary_percent=1.0,
        norm_epsilon=1e-6,
        normalization="RMSNorm",
        position_embedding_type="rope",
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        num_experts=None,
        use_rope_scaling=False,
        seq_length=LENGTH,
        attention_backend=Backend.flash,
        params_dtype=torch.float32,
    )
