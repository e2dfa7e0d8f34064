"""Which fused kernels Megatron-Core will use here, by what it can import.

NVIDIA's apex is built from source; the package index gives its name to another project. So not the
name is looked for but the compiled modules that Megatron-Core calls, which only NVIDIA's has.
"""

from __future__ import annotations

import importlib.util

import torch

# Megatron-Core's tensor_parallel/layers.py multiplies and accumulates with it.
GRADIENT_ACCUMULATION = "fused_weight_gradient_mlp_cuda"
# Behind apex.optimizers.FusedAdam and apex.multi_tensor_apply.
MULTI_TENSOR = "amp_C"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def apex_finding() -> str:
    """What stands under the name apex, in words."""
    if _installed(MULTI_TENSOR) and _installed("apex"):
        return "installed"
    if _installed("apex"):
        return "a package of that name is installed, but not NVIDIA's"
    return "not installed"


def gradient_accumulation_is_fused() -> bool:
    """Whether weight gradients can be added to the gradient buffers by the product itself."""
    return torch.cuda.is_available() and _installed(GRADIENT_ACCUMULATION)


def fused_pieces() -> list[tuple[str, str]]:
    """(piece, active or what stands in for it and why), as Megatron-Core has decided."""
    from megatron.core import optimizer  # noqa: PLC0415
    from megatron.core.optimizer import clip_grads  # noqa: PLC0415

    fused = gradient_accumulation_is_fused()
    return [
        ("Adam", _origin(optimizer.Adam.__module__)),
        ("gradient norm", _origin(clip_grads.l2_norm_impl.__module__)),
        (
            "gradient fusion",
            "active, NVIDIA apex" if fused else f"plain: needs a GPU and {GRADIENT_ACCUMULATION}",
        ),
        ("SwiGLU", _swiglu()),
    ]


def _swiglu() -> str:
    """Megatron-Core's own kernel; which layers have it, model/llm.py says."""
    if torch.cuda.is_available() and _installed("transformer_engine"):
        return "fused in Transformer Engine's layers, torch.compile"
    return "plain: needs a GPU and Transformer Engine"


def _origin(module: str) -> str:
    """Whose code a function is, from the module that defines it."""
    owners = {
        "transformer_engine": "fused, Transformer Engine",
        "transformer_engine_torch": "fused, Transformer Engine",
        "apex": "fused, NVIDIA apex",
        "amp_C": "fused, NVIDIA apex",
    }
    return owners.get(module.split(".")[0], "plain torch: neither Transformer Engine nor apex")
