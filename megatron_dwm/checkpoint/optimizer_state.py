"""Loads a saved optimizer, sharded over replicas or not, into either kind.

Both kinds save Adam's moments under the same names. They differ in the names of the fp32 parameters
and of Adam's step count:

                     fp32 parameters                     step
    plain, fp32      the model's own, `K`                state.common_step
    plain, bf16      `optimizer.state.fp32_param.K`      optimizer.state.common_step
    sharded          `optimizer.state.param.K`           optimizer.param_groups[].step
    fused Adam       as above                            param_groups[].step

So tensors are requested by the names in the checkpoint. Only they and the step count are loaded;
learning rates, betas and the rest come from the run's configuration.
(Megatron-Core 0.16.1, optimizer/optimizer.py and optimizer/distrib_optimizer.py,
`sharded_state_dict`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    StateDict,
)

_MAIN_PARAMETER = ("optimizer.state.param.", "optimizer.state.fp32_param.")
_STEP = ("step", "common_step")


def under_saved_names(state: ShardedStateDict, saved: set[str]) -> ShardedStateDict:
    """Returns the optimizer's state with the names that the checkpoint has for its tensors.

    saved: every name in the checkpoint. A missing name does not change, and loading will report it.
    """

    def renamed(item: Any) -> Any:
        if not isinstance(item, ShardedTensor | ShardedTensorFactory):
            return item
        return replace(item, key=_saved_name(item.key, saved))

    return _mapped(state, renamed)


def filled(state: ShardedStateDict, tensors: StateDict, step: Any) -> StateDict:
    """Returns the optimizer's state, filled with the loaded tensors and Adam's step count.

    tensors: the loaded `state`. step: the saved count, a number or a tensor of one element.
    """
    return {key: _filled(key, item, tensors.get(key), step) for key, item in state.items()}


def saved_step(common: Any) -> Any:
    """Returns Adam's step count from the part of an optimizer's state that is no tensor.

    Raises ValueError if there is none.
    """
    for step in _steps(common):
        return step
    raise ValueError("the optimizer's step count is missing")


def _saved_name(name: str, saved: set[str]) -> str:
    for prefix in _MAIN_PARAMETER:
        if name.startswith(prefix):
            parameter = name.removeprefix(prefix)
            others = [f"{other}{parameter}" for other in _MAIN_PARAMETER]
            return next((n for n in [name, *others, parameter] if n in saved), name)
    return name


def _mapped(value: Any, call: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(item, call) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, call) for item in value]
    return call(value)


def _filled(key: Any, own: Any, loaded: Any, step: Any) -> Any:
    if key in _STEP:
        return torch.full_like(own, step) if torch.is_tensor(own) else type(own)(step)
    if isinstance(own, ShardedTensor | ShardedTensorFactory):
        assert loaded is not None, f"{own.key} was not loaded"
        return loaded
    if isinstance(own, LocalNonpersistentObject):
        return own.unwrap()
    if isinstance(own, dict):
        found = loaded if isinstance(loaded, dict) else {}
        return {name: _filled(name, item, found.get(name), step) for name, item in own.items()}
    if isinstance(own, list):
        others = loaded if isinstance(loaded, list) else [None] * len(own)
        return [_filled(None, item, other, step) for item, other in zip(own, others, strict=True)]
    return own


def _steps(value: Any) -> Iterator[Any]:
    """Yields every step count in a nested state."""
    if isinstance(value, dict):
        yield from (value[key] for key in _STEP if value.get(key) is not None)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _steps(item)
