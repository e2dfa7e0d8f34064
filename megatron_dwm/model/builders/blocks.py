"""Which of a model's blocks are which layer of the LLM.

GPTModel has one block for each layer; HybridModel has two, attention and then the MLP, and numbers
the blocks: from 0 in the names of a chunk's parameters, from 1 over the whole model in
`layer_number`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.nn import Module

from megatron_dwm.config.schema_llm import Builder

BLOCKS: dict[Builder, int] = {"gpt": 1, "hybrid": 2}
"""blocks in a layer"""


def blocks_per_layer(module: Any) -> int:
    """Returns the number of blocks that a layer of this model has."""
    return getattr(module.decoder, "blocks_per_layer", BLOCKS["gpt"])


def first_layer(module: Any) -> int:
    """Returns the number, from 0 in the whole model, of the first layer of this chunk."""
    return (module.decoder.layers[0].layer_number - 1) // blocks_per_layer(module)


def layer_ends(module: Any) -> Iterator[tuple[int, Module]]:
    """Yields (number from 1 in the whole model, last block) of each layer of this chunk."""
    blocks = blocks_per_layer(module)
    for block in module.decoder.layers:
        if block.layer_number % blocks == 0:
            yield block.layer_number // blocks, block
