"""Checkpoints in the form of Megatron-LM's, saved by megatron-core's own code path."""

from __future__ import annotations

import argparse
import enum
from collections.abc import Callable
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

from megatron_dwm.bilevel.coordinates import named_parameters
from megatron_dwm.bilevel.slots import collect_slots, publish_gradients
from megatron_dwm.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dwm.model import build_llm
from megatron_dwm.model.initialize import slice_of_rank
from megatron_dwm.run.starting_point import load_model, load_start, shape_of_model
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.training import Learner, build_learner

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
    moments: str | None = None,
    broken: bool = False,
    **options: Any,
) -> Tensor:
    """Save a model under `folder`, with optimizer and arguments; returns its logits [2, S, V].

    Logits are of one process; several return an empty tensor. options: of `_built`.
    moments: a file for parameters and Adam's moments by name, after three steps.
    broken: the last norm has a value that is none.
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
        if broken:
            model.decoder.final_layernorm.weight.data[3] = float("nan")
        if moments is not None:
            torch.save(_trained(model, optimizer), moments)
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


def _trained(model: GPTModel, optimizer: Any) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Take steps with random gradients; returns (parameter, first, second moment) by name."""
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.main_grad.normal_(generator=generator)
        optimizer.step()
    state = optimizer.chained_optimizers[0].optimizer.state
    return {
        name: (parameter.detach(), state[parameter]["exp_avg"], state[parameter]["exp_avg_sq"])
        for name, parameter in model.named_parameters()
    }


def wrong_moments(theirs: str, moments: str, sharded: bool, **layout: int) -> list[str]:
    """Returns what a learner that starts with them has other than Megatron's optimizer had."""
    expected = torch.load(moments)
    parallel = ParallelConfig(sharded_optimizer=sharded, **layout)
    start = ModelConfig(init_from=theirs, init_optimizer=True)
    with bring_up(parallel, seed=2) as runtime:
        learner = build_learner(
            shape_of_model(Path(theirs), "theirs"),
            *(start, parallel, TrainingConfig(), runtime),
            sequence_length=LENGTH,
            seed=5,
        )
        load_start(learner, start)
        steps = {slot.moments().step for slot in collect_slots(learner.optimizer)}
        wrong = [] if steps == {7} else [f"steps {steps}"]
        wrong += _differing(learner, 0, lambda parameter: parameter.detach(), expected)
        for number, kind in ((1, "exp_avg"), (2, "exp_avg_sq")):
            _show(learner, kind)
            wrong += _differing(learner, number, lambda parameter: parameter.main_grad, expected)
        return wrong


def _differing(
    learner: Learner, number: int, read: Callable[[Any], Tensor], expected: dict[str, Any]
) -> list[str]:
    runtime = learner.runtime
    return [
        f"{name} {number}"
        for name, parameter in named_parameters(learner.llm)
        if not torch.equal(
            read(parameter),
            slice_of_rank(
                expected[name][number], parameter, runtime.tensor_rank, runtime.tensor_size
            ),
        )
    ]


def _show(learner: Learner, kind: str) -> None:
    """Write a moment into the gradient buffers of every rank."""
    learner.optimizer.prepare_grads()
    slots = collect_slots(learner.optimizer)
    for slot in slots:
        slot.gradient.copy_(slot.state[kind].view_as(slot.gradient))
    publish_gradients(learner.llm, learner.optimizer, slots)


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
