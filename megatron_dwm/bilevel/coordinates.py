"""Numbers of the model's parameters that are the same under every layout.

Every element of every parameter has a number from 0 to N - 1, with N the elements of the whole
model: its parameter's first number, plus row * columns + column in the whole, uncut parameter. A
rank knows the numbers of its elements without communication, from the shape of the LLM and from
how Megatron-Core cuts parameters. A tied output layer on another stage has the numbers of the
embedding, of which it is a copy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_dwm.model import LLM, LlamaShape
from megatron_dwm.model.builders.blocks import first_layer
from megatron_dwm.model.initialize import global_parameter_names, slice_of_rank
from megatron_dwm.model.on_disk.parameter_names import EMBEDDING, OUTPUT, megatron_sizes

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def num_elements(shape: LlamaShape) -> int:
    """Returns N, the number of elements of all parameters of the whole model."""
    return sum(math.prod(size) for size in megatron_sizes(shape).values())


@dataclass(frozen=True)
class Numbering:
    """The first number of every parameter of the whole model, by global name."""

    shape: LlamaShape

    def first(self, name: str) -> tuple[int, tuple[int, ...]]:
        """Returns a parameter's first number, and the size of the whole parameter.

        Raises NotImplementedError for a parameter that no Llama has.
        """
        sizes = megatron_sizes(self.shape)
        found = _LAYER.match(name)
        stacked = _LAYER.sub("decoder.layers.", name)
        if stacked not in sizes:
            raise NotImplementedError(f"sketches of gradients have no number for {name}")
        counts = [math.prod(size) for size in sizes.values()]
        firsts = dict(zip(sizes, accumulate(counts, initial=0), strict=False))
        if found is None:
            return firsts[stacked], sizes[stacked]
        size = sizes[stacked][1:]
        return firsts[stacked] + int(found[1]) * math.prod(size), size


def named_parameters(llm: LLM) -> Iterator[tuple[str, Parameter]]:
    """Yields (global name, parameter) of this rank; a tied output layer is the embedding."""
    for module in llm.modules:
        for name, parameter in global_parameter_names(module, first_layer(module)):
            tied = name == OUTPUT and llm.shape.tied_embeddings
            yield EMBEDDING if tied else name, parameter


def element_numbers(llm: LLM, name: str, parameter: Parameter) -> Tensor:
    """Returns int64 numbers of the elements of one of this rank's parameters, shaped like it."""
    first, size = Numbering(llm.shape).first(name)
    places = [_places(llm, parameter, dim, length) for dim, length in enumerate(size)]
    numbers = places[0] if len(size) == 1 else places[0][:, None] * size[1] + places[1]
    assert numbers.shape == parameter.shape, (name, numbers.shape, parameter.shape)
    return numbers + first


def _places(llm: LLM, parameter: Any, dim: int, length: int) -> Tensor:
    """Returns [local length]: which of the whole parameter's `length` rows or columns are here."""
    whole = torch.arange(length, device=parameter.device)
    if not getattr(parameter, "tensor_model_parallel", False) or parameter.partition_dim != dim:
        return whole
    runtime = llm.runtime
    along = whole.view(-1, 1) if dim == 0 else whole.view(1, -1)
    return slice_of_rank(along, parameter, runtime.tensor_rank, runtime.tensor_size).flatten()
