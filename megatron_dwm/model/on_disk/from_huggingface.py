"""Loads a rank's parameters from a Hugging Face model, in any parallel layout.

Every rank reads the tensors of its own layers and keeps its slice, cut as in initialize.py. Cost:
every rank reads its stage's part of the files, and holds one whole parameter at a time.
"""

from __future__ import annotations

import torch

from megatron_dwm.model.builders.blocks import first_layer
from megatron_dwm.model.initialize import global_parameter_names, slice_of_rank
from megatron_dwm.model.llm import LLM
from megatron_dwm.model.on_disk.huggingface_files import HuggingFaceModel
from megatron_dwm.model.on_disk.parameter_names import megatron_tensor


@torch.no_grad()
def load_huggingface(llm: LLM, source: HuggingFaceModel) -> None:
    """Copy `source` into the parameters of this rank, in the precision of the parameters.

    The LLM has to have the shape of `source`.
    """
    assert llm.shape == source.shape, (llm.shape, source.shape)
    runtime = llm.runtime
    for module in llm.modules:
        for name, parameter in global_parameter_names(module, first_layer(module)):
            whole = megatron_tensor(llm.shape, name, source.read)
            mine = slice_of_rank(whole, parameter, runtime.tensor_rank, runtime.tensor_size)
            parameter.copy_(mine)
