"""Reads the tensors of a checkpoint with Hugging Face's names and layout, one after the other.

Cost: one read of every tensor, and memory for one layer's tensor and its parts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_dwm.convert.checkpoint_reader import SavedLLM
from megatron_dwm.model.on_disk.parameter_names import (
    EMBEDDING,
    FINAL_NORM,
    LAYER_TENSORS,
    OUTPUT,
    WHOLE_TENSORS,
    layer_sizes,
)


def huggingface_tensors(saved: SavedLLM) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of every parameter, layer after layer.

    The rows that pad the vocabulary are left out. No two tensors share memory.
    """
    shape = saved.shape
    yield WHOLE_TENSORS[EMBEDDING], saved.read(EMBEDDING, rows=shape.vocab_size)
    for layer in range(shape.num_layers):
        for source in layer_sizes(shape):
            module, _, kind = source.rpartition(".")
            parts = LAYER_TENSORS[module].split(shape, saved.read_layer(source, layer))
            for name, part in parts.items():
                yield f"model.layers.{layer}.{name}.{kind}", _with_own_memory(part)
    yield WHOLE_TENSORS[FINAL_NORM], saved.read(FINAL_NORM)
    if not shape.tied_embeddings:
        yield WHOLE_TENSORS[OUTPUT], saved.read(OUTPUT, rows=shape.vocab_size)


def _with_own_memory(part: Tensor) -> Tensor:
    """Returns `part` in memory that holds nothing else; most parts are already so."""
    alone = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
    return part if alone else part.clone(memory_format=torch.contiguous_format)
