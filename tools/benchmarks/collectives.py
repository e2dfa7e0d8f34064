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
class Message:
    """One call of torch.distributed: its operation, the ranks of its group, its bytes."""

    name: str
    ranks: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Traffic:
    """Calls of torch.distributed, in their order."""

    messages: list[Message] = field(default_factory=list)

    @property
    def calls(self) -> Counter[str]:
        """Number of calls by the name of the operation."""
        return Counter(message.name for message in self.messages)

    @property
    def num_bytes(self) -> Counter[str]:
        """Bytes by the name of the operation."""
        found: Counter[str] = Counter()
        for message in self.messages:
            found[message.name] += message.num_bytes
        return found


class CountCalls(TorchDispatchMode):
    """Counts into `traffic` every call of torch.distributed while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == _NAMESPACE:
            name = func.overloadpacket.__name__
            ranks = _ranks(args)
            if name not in _NOT_COUNTED and len(ranks) > 1:
                num_bytes = max(_bytes(argument) for argument in args)
                self.traffic.messages.append(Message(name, ranks, num_bytes))
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
        total.messages.extend(one.messages)
    return total


def _row(label: str, plain: Traffic, update: Traffic, names: list[str]) -> list[str]:
    cells = [label]
    for before, after in ((plain.calls, update.calls), (plain.num_bytes, update.num_bytes)):
        one, other = (sum(counter[name] for name in names) for counter in (before, after))
        cells += [str(one), str(other), f"{other - _STEPS * one:+d}"]
    return cells


def _ranks(args: tuple[Any, ...]) -> tuple[int, ...]:
    [group, *_] = (argument for argument in args if isinstance(argument, torch.ScriptObject))
    return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, (list, tuple)):
        return sum(_bytes(part) for part in argument)
    return 0
