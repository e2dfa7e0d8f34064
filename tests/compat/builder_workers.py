"""What the ranks of the tests of GPTModel and HybridModel run."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch.nn import Module

from megatron_dwm.checkpoint.parts import sharded_model
from tests.tiny import tiny


def built(**layout: Any) -> tuple[str, list[tuple[Any, ...]]]:
    """Returns the class of this rank's models, and the places that a checkpoint has for its state.

    A place is a name, the whole shape, and the offset and shape of this rank's part.
    """
    with tiny(steps=0, **layout) as subject:
        (kind,) = {_megatrons_class(module) for module in subject.llm.modules}
        places = [
            (place.key, place.global_shape, place.global_offset, getattr(place, "local_shape", ()))
            for value in nested_values(sharded_model(subject.llm))
            for place in (value.build() if isinstance(value, ShardedTensorFactory) else [value])
        ]
        return kind, sorted(places)


def _megatrons_class(module: Module) -> str:
    return next(c.__name__ for c in type(module).mro() if c.__module__.startswith("megatron.core"))
