"""Megatron-Core on a machine without a GPU.

Megatron-Core 0.16.1 asks for CUDA devices by name. Without a GPU every such request gets the CPU,
so that its own schedules, data-parallel wrapper and optimizers run unchanged over gloo. Each
redirection below names the upstream lines that need it. Nothing here is active on a machine with a
GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from megatron.core import optimizer, utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as mixed_precision
from megatron.core.tensor_parallel import random as megatron_random
from torch.optim import SGD, AdamW
from torch.overrides import TorchFunctionMode

from megatron_dwm.runtime import releases

_CPU = torch.device("cpu")
_MULTI_TENSOR = {
    "multi_tensor_applier": utils.local_multi_tensor_applier,
    "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
}


class CudaMeansCpu(TorchFunctionMode):
    """Redirects `device="cuda"`, `Tensor.cuda()` and `Tensor.type()` to tensors on the CPU.

    Pinned memory, which torch refuses without a GPU, becomes plain memory.

    Upstream: `device="cuda"` in pipeline_parallel/schedules.py, optimizer/optimizer.py and
    optimizer/clip_grads.py; `param.type() == 'torch.cuda.FloatTensor'` in the two latter and in
    optimizer/distrib_optimizer.py; `.cuda()` in utils.py; `pin_memory=True` in
    models/common/embeddings/rope_utils.py.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **(kwargs or {}))


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


@contextmanager
def cuda_redirected_to_cpu() -> Iterator[None]:
    """Redirect to the CPU what Megatron-Core asks of CUDA, for the time of the context.

    The replaced functions stay replaced afterwards; without a GPU they have no other use. Must not
    be called on a machine with a GPU.
    """
    assert not torch.cuda.is_available()
    _replace_functions()
    _replace_optimizers()
    # jit.py compiles fused element-wise functions; a laptop may have no compiler.
    torch.compiler.set_stance("force_eager")
    with CudaMeansCpu():
        yield


def _replace_functions() -> None:
    cuda: Any = torch.cuda
    # For `device=torch.cuda.current_device()`: pipeline_parallel/p2p_communication.py,
    # tensor_parallel/layers.py, distributed/param_and_grad_buffer.py.
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *_, **__: None
    cuda.empty_cache = lambda: None
    releases.redirect_streams(cuda)
    # For CudaRNGStatesTracker and CheckpointFunction in tensor_parallel/random.py: the CPU's
    # generator takes the place of CUDA's.
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.manual_seed = torch.default_generator.manual_seed
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _replace_optimizers() -> None:
    """Give Megatron-Core torch's optimizers, and its own norm and scaling of gradients.

    It takes the CUDA kernels of Transformer Engine or apex wherever they can be imported, as in an
    NGC container on a machine without a GPU: optimizer/__init__.py, optimizer.py, clip_grads.py and
    distrib_optimizer.py. Where neither is installed, it has these already.
    """
    plain: dict[ModuleType, dict[str, Any]] = {
        optimizer: {"Adam": AdamW, "SGD": SGD, "USING_PYTORCH_OPTIMIZER": True},
        distrib_optimizer: {
            "HAVE_APEX_OR_TE": False,
            "USING_TE_OPTIMIZER": False,
            "USING_APEX_OPTIMIZER": False,
        },
        mixed_precision: _MULTI_TENSOR,
        clip_grads: {**_MULTI_TENSOR, "l2_norm_impl": utils.local_multi_tensor_l2_norm},
    }
    for module, names in plain.items():
        for name, value in names.items():
            assert hasattr(module, name), f"{module.__name__} has no {name}"
            setattr(module, name, value)
    releases.forget_scaling_by_a_tensor(clip_grads)
