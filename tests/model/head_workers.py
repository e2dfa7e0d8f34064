"""What the ranks of the tests of head norms and biases run."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_dwm.bilevel.slots import collect_slots
from megatron_dwm.checkpoint.parts import sharded_model
from megatron_dwm.config import ModelConfig, ParallelConfig
from megatron_dwm.model import resolve_shape
from megatron_dwm.model.builders.build import build_module
from megatron_dwm.model.llm import whole_model
from megatron_dwm.runtime import bring_up
from tests.tiny import tiny


def built(**layout: Any) -> dict[str, Any]:
    """Returns parameters, initial values, weight decay by name, and what a checkpoint has."""
    with tiny(steps=0, **layout) as subject:
        (module,) = subject.llm.modules
        named = dict(module.named_parameters())
        decay_of = {
            slot.model.data_ptr(): slot.group["weight_decay"]
            for slot in collect_slots(subject.optimizer)
        }
        places = [
            place
            for value in nested_values(sharded_model(subject.llm))
            for place in (value.build() if isinstance(value, ShardedTensorFactory) else [value])
            if isinstance(place, ShardedTensor)
        ]
        return {
            "parameters": sum(parameter.numel() for parameter in named.values()),
            "initial": {n: (float(p.min()), float(p.max())) for n, p in named.items()},
            # A sharded optimizer steps a part of some of the parameters.
            "decay": {
                name: decay_of.get(p.data_ptr(), 0.0 if p.dim() == 1 else 1.0)
                for name, p in named.items()
            },
            "saved": {place.key: tuple(place.global_shape) for place in places},
        }


def count(preset: str) -> int:
    """Returns the number of parameters of a preset, built by Megatron-Core."""
    model = ModelConfig(preset=preset)  # type: ignore[arg-type]
    with bring_up(ParallelConfig(), seed=1):
        chunk = whole_model(
            resolve_shape(model), model, sequence_length=64, perform_initialization=False
        )
        return sum(parameter.numel() for parameter in build_module(chunk).parameters())
