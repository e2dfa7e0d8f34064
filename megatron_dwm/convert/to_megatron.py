"""Writes the parameters of a checkpoint as Megatron-LM saves them (`torch_dist`).

    OUTPUT/latest_checkpointed_iteration.txt
    OUTPUT/iter_0001000/    tensors without a prefix, norm scales under the names of the fused
                            layers, which Megatron-LM's local layers take, too; and common.pt
                            with the arguments that --use-checkpoint-args reads

Without optimizer and random state: load it with --no-load-optim --no-load-rng, or --finetune. Cost:
the model in memory once, on the CPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from megatron_dwm.checkpoint.manifest import MANIFEST, read_manifest
from megatron_dwm.checkpoint.sharded_files import SaveError
from megatron_dwm.config import UserError
from megatron_dwm.convert.checkpoint_reader import SavedLLM, open_checkpoint
from megatron_dwm.convert.output import new_directory, require_free
from megatron_dwm.convert.written_model import built_model, save_tensors
from megatron_dwm.model.initialize import global_parameter_names
from megatron_dwm.model.layers.transformer_engine import UNFUSED_NAMES
from megatron_dwm.model.on_disk.megatron_files import LATEST

_LAYERS = "decoder.layers."
# Megatron-LM's own number of the format of common.pt.
_CHECKPOINT_VERSION = 3.0


@dataclass(frozen=True, kw_only=True)
class MegatronExport:
    """What was written. folder: of the iteration."""

    directory: Path
    folder: str
    source: Path


def export_to_megatron(source: str | Path, output: str | Path) -> MegatronExport:
    """Write a checkpoint, or a run's newest one, as directory `output` of Megatron-LM.

    Raises UserError: `output` exists or has no room, or `source` is not a complete checkpoint.
    """
    output = Path(output)
    require_free(output)
    saved = open_checkpoint(source)
    step = read_manifest(saved.directory).state.step if _has_manifest(saved) else 0
    folder = f"iter_{step:07d}"
    try:
        with new_directory(output) as partial:
            (partial / folder).mkdir()
            _write(saved, partial / folder, step)
            (partial / LATEST).write_text(str(step), encoding="utf-8")
    except SaveError as error:
        raise UserError(f"{output}: cannot be written ({error}); nothing is left there") from None
    return MegatronExport(directory=output, folder=folder, source=saved.directory)


def _has_manifest(saved: SavedLLM) -> bool:
    return (saved.directory / MANIFEST).is_file()


def _write(saved: SavedLLM, folder: Path, step: int) -> None:
    shape, length = saved.shape, saved.sequence_length
    with built_model(shape, saved.dtype, sequence_length=length) as module:
        _fill(module, saved)
        tensors = module.sharded_state_dict(prefix="")
        names = {_LAYERS + ours: _LAYERS + theirs for theirs, ours in UNFUSED_NAMES.items()}
        apply_prefix_mapping(tensors, names)
        state = {"model": tensors, "args": _arguments(saved), "iteration": step}
        save_tensors({**state, "checkpoint_version": _CHECKPOINT_VERSION}, folder)


@torch.no_grad()
def _fill(module: LanguageModule, saved: SavedLLM) -> None:
    for name, parameter in global_parameter_names(module, 0):
        parameter.copy_(_read(saved, name))


def _read(saved: SavedLLM, name: str) -> Tensor:
    if not name.startswith(_LAYERS):
        return saved.read(name)
    number, _, inner = name.removeprefix(_LAYERS).partition(".")
    return saved.read_layer(inner, int(number))


def _arguments(saved: SavedLLM) -> argparse.Namespace:
    """Returns Megatron-LM's arguments of the model, which it compares or takes on loading."""
    shape = saved.shape
    return argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        group_query_attention=shape.num_query_groups != shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_size,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.padded_vocab_size,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=int(shape.rotary_base),
        rotary_percent=1.0,
        use_rope_scaling=shape.rope_scaling_factor is not None,
        rope_scaling_factor=shape.rope_scaling_factor or 8.0,
        normalization="RMSNorm",
        norm_epsilon=shape.norm_epsilon,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        num_experts=None,
        seq_length=saved.sequence_length,
        max_position_embeddings=saved.sequence_length,
        params_dtype=saved.dtype,
        fp16=False,
        bf16=saved.dtype == torch.bfloat16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
    )
