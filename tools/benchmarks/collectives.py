"""Messages that an update sends beyond those of three plain training steps.

Counted where torch.distributed hands a call to its back end, so that every caller is seen: ours,
Megatron-Core's, and autograd's. Calls on a group of one process are left out, and so are receives
(each has its send). A call's bytes are those of its largest argument: what is reduced, broadcast or
sent, and the whole of what is gathered or scattered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.subject import Subject
from benchmarks.table import markdown

_NAMESPACE = "c10d"
_NOT_COUNTED = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_", "check_for_nan")
_STEPS = 3


@dataclass(frozen=True)
class Traffic:
    """Calls of torch.distributed and their bytes, by the name of the operation."""

    calls: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)


class CountCalls(TorchDispatchMode):
    """Counts into `traffic` every call of torch.distributed while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == _NAMESPACE:
            name = func.overloadpacket.__name__
            if name not in _NOT_COUNTED and _group_size(args) > 1:
                self.traffic.calls[name] += 1
                self.traffic.num_bytes[name] += max(_bytes(argument) for argument in args)
        return func(*args, **(kwargs or {}))


def collectives_table(subject: Subject) -> str:
    """Returns the table, or the reason why there is none (collective)."""
    if subject.runtime.world_size == 1:
        return "Collectives: none in one process; run under torchrun to count them."
    plain = _over_all(_count(subject.plain_step), subject)
    update = _over_all(_count(subject.hypergradient), subject)
    names = sorted(set(plain.calls) | set(update.calls))
    rows = [_row(name, plain, update, [name]) for name in names]
    rows.append(_row("all", plain, update, names))
    columns = (
        "torch.distributed, over all processes",
        "calls of 1 plain step",
        "of 1 hypergradient",
        f"added over {_STEPS} steps",
        "bytes of 1 plain step",
        "of 1 hypergradient",
        f"added over {_STEPS} steps",
    )
    return markdown(columns, rows)


def _count(call: Callable[[], object]) -> Traffic:
    with CountCalls() as counter:
        call()
    return counter.traffic


def _over_all(traffic: Traffic, subject: Subject) -> Traffic:
    """Returns the sum over the processes (collective)."""
    found: list[Traffic | None] = [None] * subject.runtime.world_size
    dist.all_gather_object(found, traffic)
    total = Traffic()
    for one in found:
        assert one is not None
        total.calls.update(one.calls)
        total.num_bytes.update(one.num_bytes)
    return total


def _row(label: str, plain: Traffic, update: Traffic, names: list[str]) -> list[str]:
    cells = [label]
    for before, after in ((plain.calls, update.calls), (plain.num_bytes, update.num_bytes)):
        one, other = (sum(counter[name] for name in names) for counter in (before, after))
        cells += [str(one), str(other), f"{other - _STEPS * one:+d}"]
    return cells


def _group_size(args: tuple[Any, ...]) -> int:
    groups = [argument for argument in args if isinstance(argument, torch.ScriptObject)]
    return dist.ProcessGroup.unbox(groups[0]).size()


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, (list, tuple)):
        return sum(_bytes(part) for part in argument)
    return 0
