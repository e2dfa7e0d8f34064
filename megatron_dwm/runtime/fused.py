"""Which fused kernels Megatron-Core will use here, from the modules that it can import.

NVIDIA's apex is built from source, and another project has its name in the package index. So this
file looks for the compiled modules that Megatron-Core calls, which only NVIDIA's apex has.
"""

from __future__ import annotations

import importlib.util

import torch

# The module with which Megatron-Core's tensor_parallel/layers.py multiplies and accumulates.
GRADIENT_ACCUMULATION = "fused_weight_gradient_mlp_cuda"
# The module behind apex.optimizers.FusedAdam and apex.multi_tensor_apply.
MULTI_TENSOR = "amp_C"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def apex_finding() -> str:
    """Returns in words which package has the name apex."""
    if _installed(MULTI_TENSOR) and _installed("apex"):
        return "installed"
    if _installed("apex"):
        return "a package of that name is installed, but not NVIDIA's"
    return "not installed"


def gradient_accumulation_is_fused() -> bool:
    """True if the kernel of the product can add weight gradients to the gradient buffers."""
    return torch.cuda.is_available() and _installed(GRADIENT_ACCUMULATION)


def fused_pieces() -> list[tuple[str, str]]:
    """Returns (piece, "fused" or the replacement with its reason), as Megatron-Core has decided."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads

    if not torch.cuda.is_available():
        # runtime/cpu.py replaces what a machine without a GPU cannot run.
        owners = "Transformer Engine or NVIDIA apex"
        needs = {"Adam": owners, "gradient norm": owners}
        needs |= {"gradient fusion": GRADIENT_ACCUMULATION, "SwiGLU": "Transformer Engine"}
        return [(piece, f"plain: needs a GPU and {name}") for piece, name in needs.items()]
    fused = gradient_accumulation_is_fused()
    return [
        ("Adam", _origin(optimizer.Adam.__module__)),
        ("gradient norm", _origin(clip_grads.l2_norm_impl.__module__)),
        (
            "gradient fusion",
            "active, NVIDIA apex" if fused else f"plain: needs {GRADIENT_ACCUMULATION}",
        ),
        ("SwiGLU", _swiglu()),
    ]


def _swiglu() -> str:
    """Returns the state of Megatron-Core's own kernel; model/llm.py says which layers use it."""
    if _installed("transformer_engine"):
        return "fused (torch.compile) if the precision below has transformer_engine layers"
    return "plain: needs Transformer Engine"


def _origin(module: str) -> str:
    """Returns the owner of a function, from the module that defines it."""
    owners = {
        "transformer_engine": "fused, Transformer Engine",
        "transformer_engine_torch": "fused, Transformer Engine",
        "apex": "fused, NVIDIA apex",
        "amp_C": "fused, NVIDIA apex",
    }
    missing = (
        "plain torch: Megatron-Core found no kernel of Transformer Engine or apex that it uses"
    )
    return owners.get(module.split(".")[0], missing)
