"""Logits of a checkpoint, computed by Megatron-Core's own model with one layer in memory at a time.

A model of a single layer runs that layer once for every layer of the whole model, each time with
the next layer's parameters. Megatron-Core itself says which part of which saved tensor a parameter
is (`sharded_state_dict`), so this shares no names or layouts with the export that it checks.
(Megatron-Core's loader is not used: in one process it needs whole stacks of layers, and it reads
pickles.) Cost: one read of the model's tensors and one forward pass in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import Module, ModuleList

from megatron_dwm.checkpoint.names import MODEL_PREFIX
from megatron_dwm.config import ModelConfig, ParallelConfig
from megatron_dwm.convert.checkpoint_reader import SavedLLM
from megatron_dwm.model.builders.build import build_module
from megatron_dwm.model.llm import whole_model
from megatron_dwm.runtime import bring_up

_LAYER = f"{MODEL_PREFIX}decoder.layers."


@torch.no_grad()
def megatron_logits(saved: SavedLLM, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns float32 logits [B, S, V] without padding; parameters are rounded to `dtype` first.

    Runs in this one process: creates Megatron's process groups and destroys them at the end.
    """
    with bring_up(ParallelConfig(), seed=0) as runtime:
        chunk = whole_model(
            replace(saved.shape, num_layers=1),
            ModelConfig(precision="fp32", builder=saved.builder),
            sequence_length=tokens_BS.shape[1],
            # Without initialization no memory is touched before a parameter is read.
            perform_initialization=False,
        )
        module = build_module(chunk).to(runtime.device)
        _load_parameters_on_demand(module.eval(), saved, dtype)
        tokens_BS = tokens_BS.to(runtime.device)
        positions_BS = torch.arange(tokens_BS.shape[1], device=runtime.device)
        logits_BSV = module(tokens_BS, positions_BS.expand_as(tokens_BS), None)
    return logits_BSV[..., : saved.shape.vocab_size].float().cpu()


def _load_parameters_on_demand(module: LanguageModule, saved: SavedLLM, dtype: torch.dtype) -> None:
    """Make every part of the one-layer `module` read its parameters just before it runs."""
    blocks = list(module.decoder.layers)
    whole = module.sharded_state_dict(prefix=MODEL_PREFIX)
    for prefix, part in (
        ("embedding.", module.embedding),
        ("decoder.final_layernorm.", module.decoder.final_layernorm),
        ("output_layer.", module.output_layer),
    ):
        name = MODEL_PREFIX + prefix
        state = {key: value for key, value in whole.items() if key.startswith(name)}
        part.register_forward_pre_hook(_reader(saved, name, _once(state), dtype))
        # A tied output layer needs the embedding's parameter at the end.
        if not (saved.shape.tied_embeddings and part is module.embedding):
            part.register_forward_hook(_drop)
    for block in blocks:
        states = _states_as_layers(block, saved.shape.num_layers)
        block.register_forward_pre_hook(_reader(saved, _LAYER, states, dtype))
    module.decoder.layers = ModuleList(blocks * saved.shape.num_layers)


def _once(state: ShardedStateDict) -> Iterator[ShardedStateDict]:
    """Yields `state` once and keeps no reference to its tensors."""
    waiting = [state]
    while waiting:
        yield waiting.pop()


def _states_as_layers(block: TransformerLayer, num_layers: int) -> Iterator[ShardedStateDict]:
    """Yields what `block` would save in layer 0, 1, ... of a whole model."""
    for number in range(num_layers):
        yield block.sharded_state_dict(_LAYER, ((0, number, num_layers),))


def _reader(
    saved: SavedLLM, prefix: str, states: Iterator[ShardedStateDict], dtype: torch.dtype
) -> Callable[[Module, Any], None]:
    def read(part: Module, _: Any) -> None:
        state = next(states)
        for name, parameter in part.named_parameters():
            parameter.copy_(_read(saved, state[prefix + name]).to(dtype))

    return read


def _drop(part: Module, *_: Any) -> None:
    for parameter in part.parameters():
        parameter.data = parameter.new_empty(0)


def _read(saved: SavedLLM, place: ShardedTensor | ShardedTensorFactory) -> Tensor:
    """Returns the saved part that Megatron-Core assigns to a parameter."""
    if isinstance(place, ShardedTensorFactory):  # gate and up are two parts of one tensor
        return place.merge_fn([_read(saved, part) for part in place.build()])
    leading = [1] * place.prepend_axis_num
    name = place.key.removeprefix(MODEL_PREFIX)
    box = saved.read_box(name, list(place.global_offset), [*leading, *place.local_shape])
    return box.view(place.local_shape)
