"""Initial parameters that do not depend on the parallel layout.

Megatron-Core draws every rank's parameters from that rank's own generator, so another layout gives
other initial values. Here each parameter has its own generator, seeded with the run's seed and the
parameter's global name; every rank draws the whole tensor and keeps its slice. Cost: one pass over
the parameters, and the memory of the largest whole tensor.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_dwm.model.builders.blocks import blocks_per_layer
from megatron_dwm.model.layers.transformer_engine import unfused_name


def global_parameter_names(module: Module, first_layer: int) -> Iterator[tuple[str, Parameter]]:
    """Yields (global name, parameter) of a chunk whose layer 0 is the model's `first_layer`.

    The names are those of GPTModel with the unfused spec, whatever the model was built from.
    """
    blocks = blocks_per_layer(module)
    for name, parameter in module.named_parameters():
        yield (
            re.sub(
                r"decoder\.layers\.(\d+)\.",
                lambda match: f"decoder.layers.{int(match[1]) // blocks + first_layer}.",
                unfused_name(name),
            ),
            parameter,
        )


def initialize_parameters(
    module: Module,
    *,
    first_layer: int,
    num_layers: int,
    init_std: float,
    seed: int,
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Draw the parameters from a normal distribution, in place; norm scales become 1, biases 0.

    The standard deviation is `init_std`. The two projections back into the residual stream get
    init_std / sqrt(2 * num_layers), as in Megatron-LM and GPT-2.
    """
    with torch.no_grad():
        for name, parameter in global_parameter_names(module, first_layer):
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = init_std / math.sqrt(2 * num_layers) if into_residual else init_std
            # A tied output layer on another stage is a copy of the input embedding.
            source = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
            tied = name != source and getattr(parameter, "shared_embedding", False)
            whole = _draw(parameter, source if tied else name, seed, std, tensor_size)
            parameter.copy_(slice_of_rank(whole, parameter, tensor_rank, tensor_size))


def _draw(parameter: Parameter, name: str, seed: int, std: float, tensor_size: int) -> Tensor:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[_partition(parameter)[0]] *= tensor_size
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def slice_of_rank(whole: Tensor, parameter: Parameter, rank: int, size: int) -> Tensor:
    """Returns this rank's part of a whole tensor, cut as Megatron-Core cuts `parameter`.

    A stride of 2 (gate and up of SwiGLU) means that each half is cut by itself.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, stride = _partition(parameter)
    halves = whole.chunk(stride, dim=dim)
    return torch.cat([half.chunk(size, dim=dim)[rank] for half in halves], dim=dim)


def _partition(parameter: Any) -> tuple[int, int]:
    """Returns (dimension, stride), which Megatron-Core sets on the parameters that it cuts."""
    return parameter.partition_dim, parameter.partition_stride
