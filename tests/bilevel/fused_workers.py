"""A model with norms fused into the linear layers after them, in plain torch on a CPU.

Modules, names and attributes are those of Transformer Engine's layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_dwm.bilevel.adapters import ADAPTERS
from megatron_dwm.bilevel.tangent_probe import tangent_probe
from megatron_dwm.model import llm as llm_module
from megatron_dwm.model.layers import local as modules
from megatron_dwm.model.layers.transformer_engine import UNFUSED_NAMES
from megatron_dwm.model.passes.objective import unit
from tests.bilevel.fp8_workers import leave_validation_gradient
from tests.bilevel.workers import TRAIN
from tests.tiny import MICRO_BATCH, Tiny, tiny

FUSED = "megatron.core.extensions.transformer_engine.TELayerNormColumnParallelLinear"


class NormColumnLinear(ColumnParallelLinear):
    """RMSNorm and a column-parallel layer in one module."""

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        config = options["config"]
        self.normalization, self.zero_centered_gamma = "RMSNorm", False
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Returns [S, B, C / tensor size] from [S, B, D]."""
        gain = self.layer_norm_weight
        return super().forward(F.rms_norm(x, gain.shape, gain, self.eps))


def fused_block_spec(num_layers: int, *_: object, **__: object) -> TransformerBlockSubmodules:
    """Returns the spec's layers with the norms moved into the linear layers after them."""
    spec = modules.llama_block_spec(num_layers)
    for layer in spec.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        parts.self_attention.submodules.linear_qkv = NormColumnLinear
        parts.mlp.submodules.linear_fc1 = NormColumnLinear
        parts.sharded_state_dict_keys_map = dict(UNFUSED_NAMES)
    return spec


def alignments_and_names(fused: bool, **layout: Any) -> tuple[Tensor, list[str]]:
    """Returns (alignments, names in a checkpoint) of the fused or the unfused model."""
    if fused:  # this process ends with the cases of one layout, the unfused ones first
        llm_module.llama_block_spec = fused_block_spec
    with tiny(**layout) as subject:
        return _alignments_and_names(subject)


def _alignments_and_names(subject: Tiny) -> tuple[Tensor, list[str]]:
    leave_validation_gradient(subject)
    name = f"{NormColumnLinear.__module__}.{NormColumnLinear.__qualname__}"
    adapters = {**ADAPTERS, name: ADAPTERS[FUSED]}
    found = tangent_probe(subject.llm, unit(subject.batch(TRAIN), MICRO_BATCH), adapters)
    saved = subject.llm.modules[0].sharded_state_dict()
    keys = {part.key for part in saved.values() if "_extra_state" not in part.key}
    return found, sorted(keys)


def with_swiglu_fused(**layout: Any) -> dict[str, tuple[Any, Any]]:
    """Returns alignments, gradients and bytes kept by autograd, without and with fused SwiGLU.

    It is Megatron-Core's own function, without the torch.compile that makes a kernel on a GPU.
    """
    torch.compiler.set_stance("force_eager")
    with tiny(**layout) as subject:
        found = []
        for fused in (False, True):
            subject.llm.transformer.bias_activation_fusion = fused
            subject.gradient(TRAIN)
            gradients = torch.cat([p.main_grad.flatten() for p in subject.llm.parameters()])
            leave_validation_gradient(subject)
            alignments = tangent_probe(subject.llm, unit(subject.batch(TRAIN), MICRO_BATCH))
            found.append((alignments, gradients, _kept_bytes(subject)))
        names = ("alignments", "gradients", "kept")
        return dict(zip(names, zip(*found, strict=True), strict=True))


def _kept_bytes(subject: Tiny) -> int:
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = subject.batch(TRAIN).rows(0, MICRO_BATCH)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = subject.llm.chunks[0](
            batch.tokens_BS, batch.position_ids_BS, None, labels=batch.labels_BS
        )
    assert loss.requires_grad
    return sum(found.values())
