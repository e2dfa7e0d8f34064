"""A second model in host memory: on the device only while it is in use.

The storages of the tensors are copied to the host and then freed, by resizing them to nothing, and
allocated and filled again before a use. So all views stay valid: parameters that lie in one buffer,
the optimizer's main parameters, Megatron's gradients. Gradient buffers are zero between uses, so
only their size is kept. On a GPU the host's copies are page-locked (not run).

What Transformer Engine keeps of weights in FP8 stays on the device. Cost: every use copies what it
needs over the bus, and what it changes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, UntypedStorage

from megatron_dwm.model.llm import LLM


@dataclass(frozen=True)
class _Away:
    """A storage that was freed. host: its bytes; None if they are zero."""

    storage: UntypedStorage
    num_bytes: int
    host: Tensor | None


class _Tensors:
    """The storages of some tensors, on the device or freed.

    find: returns the tensors. It is asked whenever they are freed, since an optimizer may have
        other ones after loading. keeps: False if they are zero between uses.
    """

    def __init__(self, find: Callable[[], Iterable[Tensor]], *, keeps: bool = True) -> None:
        self._find, self._keeps = find, keeps
        self._away: list[_Away] = []
        self._hosts: dict[int, Tensor] = {}
        self._uses = 0
        self._changed = True

    @contextmanager
    def in_use(self, *, changes: bool) -> Iterator[None]:
        """Have the tensors on the device during the context; contexts may be nested."""
        if not self._uses:
            self._bring()
        self._uses, self._changed = self._uses + 1, self._changed or changes
        try:
            yield
        finally:
            self._uses -= 1
            if not self._uses:
                self.free()

    def free(self) -> None:
        """Free the storages; what may have changed is copied to the host before."""
        storages = list(_storages(self._find()).values())
        hosts = {storage._cdata: self._copied(storage) for storage in storages if self._keeps}
        self._away = [_Away(each, each.nbytes(), hosts.get(each._cdata)) for each in storages]
        self._hosts, self._changed = hosts, False
        for away in self._away:
            away.storage.resize_(0)

    def _bring(self) -> None:
        for away in self._away:
            away.storage.resize_(away.num_bytes)
            values = _bytes_of(away.storage)
            values.zero_() if away.host is None else values.copy_(away.host)
        self._away = []

    def _copied(self, storage: UntypedStorage) -> Tensor:
        values, host = _bytes_of(storage), self._hosts.get(storage._cdata)
        if host is not None and not self._changed:
            return host
        if host is None or len(host) != len(values):
            host = torch.empty(len(values), dtype=torch.uint8, pin_memory=values.is_cuda)
        return host.copy_(values)


class Offload:
    """A model, and its optimizer if it has one, in host memory between its uses.

    Without a model it moves nothing: for one that stays on the device.
    """

    def __init__(self, llm: LLM | None = None, optimizer: ChainedOptimizer | None = None) -> None:
        """Move both to the host; they are on the device now."""
        self._weights = _Tensors(list if llm is None else llm.parameters)
        self._rest: list[_Tensors] = []
        if llm is not None and optimizer is not None:
            self._rest = [
                _Tensors(lambda: _gradients(llm), keeps=False),
                _Tensors(lambda: _of_optimizer(llm, optimizer)),
            ]
        for tensors in (*self._rest, self._weights):
            tensors.free()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Have the parameters on the device, for forward passes."""
        with self._weights.in_use(changes=False):
            yield

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Have everything on the device: for steps, and to save or load it."""
        with ExitStack() as stack:
            # The parameters are freed last, since some optimizers have them as their own.
            for tensors in (self._weights, *self._rest):
                stack.enter_context(tensors.in_use(changes=True))
            yield


def _storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """Returns every storage once; the key stays the same while it is freed."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in found}


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _gradients(llm: LLM) -> Iterator[Tensor]:
    for chunk in llm.chunks:
        for buffer in chunk.buffers:
            yield buffer.grad_data


def _of_optimizer(llm: LLM, optimizer: ChainedOptimizer) -> Iterator[Tensor]:
    """Yields main parameters and moments; not parameters that are those of the model."""
    weights = _storages(llm.parameters())
    for member in optimizer.chained_optimizers:
        adam = member.optimizer
        mains = [main for group in adam.param_groups for main in group["params"]]
        states = [value for state in adam.state.values() for value in state.values()]
        for tensor in (*mains, *states):
            # A step count is a number, on the host as it is.
            is_moved = isinstance(tensor, Tensor) and tensor.dim() > 0
            if is_moved and tensor.untyped_storage()._cdata not in weights:
                yield tensor
