"""Counts where the code asks for a value that is on the device, which makes the host wait for it.

A CPU has nothing to wait for, but the same operations run. Counted are reads of a tensor by the
host, operations whose result has a size that depends on values, and tensors that are made of the
host's numbers on the device, which torch copies from ordinary memory and waits for.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dwm.training import UpperLevel
from megatron_dwm.weighting.uniform import Uniform
from tests.documents import packed_batch
from tests.subjects import with_dwm, with_method
from tests.tiny import MICRO_BATCH, tiny

_OF_HOST = {torch.Tensor.tolist: "tolist", torch.Tensor.cpu: "cpu", torch.Tensor.numpy: "numpy"}
_MAKES = {torch.tensor: "tensor", torch.as_tensor: "tensor"}
_AS_LONG_AS_VALUES = ("nonzero", "masked_select", "bincount", "_unique2", "repeat_interleave")
# torch's own Adam for CPUs reads its step counts; the fused ones for GPUs do not.
_PACKAGES = ("/megatron_dwm/", "/megatron/core/", "/torch/optim/")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts waits by file and kind; those of torch's optimizers and Megatron-Core by package."""
    found: Counter[str] = Counter()
    with _Functions(found), _Operations(found):
        yield found


class _Functions(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OF_HOST or (func in _MAKES and kwargs.get("device") is not None):
            self._found[f"{_place()} {_OF_HOST.get(func) or _MAKES[func]}"] += 1
        if func is torch.Tensor.__getitem__ and isinstance(args[1], list):
            self._found[f"{_place()} list"] += 1
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name == "_local_scalar_dense":
            self._found[f"{_place()} item"] += 1
        elif name in _AS_LONG_AS_VALUES or (name in ("index", "index_put") and _has_mask(args)):
            self._found[f"{_place()} {name}"] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(args: tuple[Any, ...]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def _place() -> str:
    """Returns the file of ours that runs, or the package that does."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        package = next((part for part in _PACKAGES if part in name), None)
        if package is not None and not name.endswith("runtime/cpu.py"):
            inside = name.rpartition("/megatron_dwm/")[2]
            return inside if package == _PACKAGES[0] else package.strip("/")
        frame = frame.f_back
    return "elsewhere"


def waits_of_a_step(
    method: str = "uniform", documents: bool = False, update: bool = False, **layout: Any
) -> dict[str, int]:
    """Counts the waits of the product's own step, the third one, by place and kind."""
    with tiny(**layout) as subject:
        ours = _METHODS[method](subject)

        def batch(number: int) -> Any:
            options = {"border_loss": True}
            return (
                packed_batch(number, subject.runtime, **options)
                if documents
                else subject.batch(number)
            )

        for number in range(2):
            ours.taken(batch(number))
        # As the feed does: what a batch says about itself is read before it is on the device.
        third, upper = batch(2).to(subject.runtime.device), None
        if update:
            upper = UpperLevel(passages=subject.batch(100))
        with counted() as found:
            ours.taken(third, upper)
        return dict(found)


_METHODS: dict[str, Callable[[Any], Any]] = {
    "uniform": lambda subject: with_method(subject, Uniform(), MICRO_BATCH),
    "dwm": lambda subject: with_dwm(subject, MICRO_BATCH),
    "dwm, features": lambda subject: with_dwm(subject, MICRO_BATCH, encoder="llm"),
    "dwm, global": lambda subject: with_dwm(subject, MICRO_BATCH, group="global"),
}
