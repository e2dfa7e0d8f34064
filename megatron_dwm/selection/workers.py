"""One function over many batches of documents, by several processes, results in order.

A process builds its own state once (a tokenizer, open files) and then takes the numbers of the
documents of one batch after the other. Batches go to the processes in turn, so the results do not
depend on their number. Each process has one batch at work and one result waiting; memory is that
of two batches for each.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from megatron_dwm.config.errors import RunError, UserError

Result = TypeVar("Result")
ResultOut = TypeVar("ResultOut", covariant=True)
BATCH_TOKENS = 1 << 19


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive documents."""

    begin: int
    end: int


class Work(Protocol[ResultOut]):
    """What a process does; it is sent to each of them."""

    def build(self) -> Callable[[Span], ResultOut]:
        """Open files and build tables; returns the function of a batch."""
        ...


def spans_of(tokens_D: np.ndarray, batch_tokens: int = BATCH_TOKENS) -> list[Span]:
    """Cut all documents into batches of about `batch_tokens`; a document is never cut."""
    ends_D = np.cumsum(tokens_D)
    total = int(ends_D[-1]) if len(ends_D) else 0
    inner = np.searchsorted(ends_D, np.arange(batch_tokens, total, batch_tokens)) + 1
    cuts = np.unique(np.concatenate([[0], inner, [len(tokens_D)]])).tolist()
    return [Span(begin=a, end=b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def map_spans(work: Work[Result], spans: Sequence[Span], num_workers: int) -> Iterator[Result]:
    """Yields the result of each of `spans`, in order.

    With one worker, or one batch, this process does the work. Raises the `UserError` of a worker,
    and `RunError` if one has died.
    """
    num_workers = min(num_workers, len(spans))
    if num_workers <= 1:
        do = work.build() if spans else None
        for span in spans:
            assert do is not None
            yield do(span)
        return
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(work)) for _ in range(num_workers)]
        for worker, span in zip(workers, spans, strict=False):
            worker.send(span)
        for number in range(len(spans)):
            worker = workers[number % num_workers]
            result = worker.receive()
            if number + num_workers < len(spans):
                worker.send(spans[number + num_workers])
            yield result


class _Worker(Generic[Result]):
    """A process with its pipe. Messages to it are small, so that sending never waits."""

    def __init__(self, work: Work[Result]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Worker[Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.join()

    def send(self, span: Span) -> None:
        """Give it a batch."""
        self._connection.send(span)

    def receive(self) -> Result:
        """Wait for the result of its batch."""
        try:
            result: Any = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RunError(
                f"a worker process died (exit code {self._process.exitcode}); with too little "
                "memory, take fewer --workers"
            ) from None
        if isinstance(result, UserError):
            raise result
        return result


def _serve(connection: Connection, work: Work[Any]) -> None:
    """Do batches until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports Ctrl-C
    try:
        do = work.build()
        while True:
            connection.send(do(connection.recv()))
    except UserError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
