"""Transformer Engine's layers through Megatron-Core; only this file imports the library.

One GPU has run it, with 2.11 (docs/gpu.md); what needs more GPUs says so. tests/signatures checks
names, arguments and attributes against the real packages. The functions that need Transformer
Engine import it themselves, because the import needs CUDA's libraries.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module

from megatron_dwm.config import ModelConfig, UserError
from megatron_dwm.model.layers.context import PartialRows, attend_to_all_parts
from megatron_dwm.model.layers.pieces import Pieces

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

# The signature tests pass with 2.9.0 to 2.20.2, under Megatron-Core 0.16.1 and 0.19.2, and 2.21 was
# not out (docs/releases.md). 2.11.0 ran on a GPU. Megatron-Core 0.16.1 declares 2.9 to 2.11 for its
# extra, but what it lacks in 2.20.2 it lacks in 2.11.0, too; later releases declare no bound.
FIRST_VERSION, END_VERSION = (2, 9), (2, 21)

# Megatron-Core's names of the norm scales in fused layers, and the names of the unfused spec, which
# initialization, checkpoints and conversion use.
UNFUSED_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


# Scale and history of maxima, by Transformer Engine's names of the forward and backward state.
ScalingState: TypeAlias = dict[str, list[torch.Tensor]]

# 2.16.1, 2.17.1, 2.18 and later load the delayed recipe's scales from a checkpoint only with this
# set to 1 (pytorch/_extra_state.py); the releases before those, and 2.17.0, unpickle what they get.
# Nothing here sets it: whether a checkpoint is trusted is the user's decision.
UNPICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def missing_for(model: ModelConfig, device: torch.device) -> str | None:
    """Returns why Transformer Engine cannot run `model` on `device`; None if it can."""
    if device.type != "cuda":
        return "there is no GPU"
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return "transformer-engine is not installed (the extra 'gpu' names it)"
    if not version_fits(version):
        return f"transformer-engine is {version}, expected 2.9 to 2.20"
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        return f"transformer-engine {version} cannot be loaded ({first_line})"
    if model.precision != "fp8":
        return None
    available = {
        "delayed": te.is_fp8_available,
        "tensorwise": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
    }
    fits, reason = available[model.fp8_recipe](return_reason=True)
    return None if fits else f"model.fp8_recipe {model.fp8_recipe}: {reason}"


def version_fits(version: str) -> bool:
    """True if the signature tests cover that release, such as '2.11.0' or '2.9.0+70f53666'."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return FIRST_VERSION <= (major, minor) < END_VERSION


def transformer_engine_block_spec(
    num_layers: int, *, parts_of_rows: bool = False, qk_layernorm: bool = False
) -> TransformerBlockSubmodules:
    """Returns Megatron-Core's spec of a chunk with `num_layers` Transformer Engine layers.

    parts_of_rows: under context parallelism.
    qk_layernorm: with a norm over each head of queries and keys.

    Norm scales are saved under the names of the unfused spec, so that checkpoints do not depend on
    the implementation that wrote them.
    """
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
    )

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
    layer.submodules.sharded_state_dict_keys_map = dict(UNFUSED_NAMES)
    if parts_of_rows:
        layer.submodules.self_attention.submodules.core_attention = attention_over_parts()
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)


def attention_over_parts() -> type[Module]:
    """Returns Megatron-Core's class of Transformer Engine's attention, with borders in parts.

    Under context parallelism Transformer Engine takes packed documents only if 2 x the group's size
    divides the length of each. Parts of rows with borders therefore go through the attention of the
    local layers. Not run.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class PartsDotProductAttention(TEDotProductAttention):
        def __init__(self, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
            super().__init__(*args, pg_collection=pg_collection, **kwargs)
            self.context_group = pg_collection.cp

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *args: Any,
            packed_seq_params: Any = None,
            **kwargs: Any,
        ) -> Tensor:
            if isinstance(packed_seq_params, PartialRows):
                masks = packed_seq_params.masks
                return attend_to_all_parts(query, key, value, masks, self.context_group)
            kwargs["packed_seq_params"] = packed_seq_params
            return super().forward(query, key, value, *args, **kwargs)

    return PartsDotProductAttention


def start_tensor_overlap(
    model: ModelConfig, device: torch.device, *, tokens: int, hidden_size: int, tensor_size: int
) -> None:
    """Make the buffers of `parallel.tp_comm_overlap`, as Megatron-LM does first (collective).

    tokens: in every micro-batch; Transformer Engine refuses one of another size.

    Raises UserError if Transformer Engine cannot run the model on `device`. Not run.
    """
    reason = missing_for(model, device)
    if reason is not None:
        raise UserError(
            f"parallel.tp_comm_overlap: needs Transformer Engine's layers: {reason}; leave it out"
        )
    from transformer_engine.pytorch.module.base import UserBufferQuantizationMode, initialize_ub

    modes = [UserBufferQuantizationMode.NONE]
    if model.precision == "fp8":
        modes[:0] = [UserBufferQuantizationMode.FP8]
        if not model.fp8_first_last_bf16:
            modes.pop()
    initialize_ub(
        shape=[tokens, hidden_size],
        tp_size=tensor_size,
        quantization_modes=modes,
        ub_cfgs={},
        bootstrap_backend="nccl",
    )


def packed_sequences(pieces: Pieces) -> PackedSeqParams:
    """Returns what the model takes as `packed_seq_params` so that attention stops at borders.

    The micro-batch [B, S] has to be flattened to one row, [1, B * S], tokens and labels alike. The
    cumulative lengths are those of its pieces, and rotary positions begin anew at each.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=pieces.cu_seqlens,
        cu_seqlens_kv=pieces.cu_seqlens,
        max_seqlen_q=pieces.max_length,
        max_seqlen_kv=pieces.max_length,
    )


def unfused_name(name: str) -> str:
    """Returns the parameter's name in the unfused spec, which most names already are."""
    for fused, unfused in UNFUSED_NAMES.items():
        name = name.replace(fused, unfused)
    return name


def read_scaling_state(modules: Iterable[Module]) -> dict[Module, ScalingState | None]:
    """Returns copies of each layer's scales and maxima, which the delayed recipe keeps.

    Every FP8 pass changes them, so a pass that must leave no trace has to restore them. For the
    delayed recipe only: the states of the others have no maxima. A layer that has not multiplied in
    FP8 yet has None.
    """
    layers: list[Any] = [
        module for model in modules for module in model.modules() if hasattr(module, "fp8_meta")
    ]
    return {layer: layer.get_fp8_meta_tensors() for layer in layers}


def write_scaling_state(states: dict[Module, ScalingState | None]) -> None:
    """Write back, in place, the scales and maxima that `read_scaling_state` returned.

    A layer that had none gets Transformer Engine's first ones: scales of 1 and maxima of 0.

    Not with set_extra_state, whose pickle Transformer Engine refuses (see `UNPICKLES`).
    """
    layer: Any
    for layer, state in states.items():
        layer.reset_fp8_meta_tensors(state)


@contextmanager
def scales_are_refused_in_one_line(directory: Path) -> Iterator[None]:
    """Raise UserError where Transformer Engine refuses the scales that `directory` has saved."""
    try:
        yield
    except RuntimeError as error:
        if UNPICKLES not in str(error):
            raise
        raise UserError(
            f"{directory}: it has scales of model.fp8_recipe delayed, which Transformer Engine "
            f"saves as a pickle; a pickle can run code, so this release of it loads them only with "
            f"{UNPICKLES}=1 in the environment. Set that only if you trust the checkpoint"
        ) from error
