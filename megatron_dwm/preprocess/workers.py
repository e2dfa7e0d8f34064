"""Encoding in several processes, results in the order of the input.

At most a few batches for each worker are under way, so memory does not grow with the corpus. The
processes are started afresh ("spawn"), because the parent holds torch and its threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor

from megatron_dwm.preprocess.encoding import EncodeSettings, encode_batch
from megatron_dwm.preprocess.records import EncodedBatch, RecordBatch

_BATCHES_UNDER_WAY_PER_WORKER = 3


def encode_all(
    settings: EncodeSettings, batches: Iterable[RecordBatch], *, num_workers: int
) -> Generator[EncodedBatch, None, None]:
    """Encoded batches in order; one worker means this process."""
    if num_workers == 1:
        for batch in batches:
            yield encode_batch(settings, batch)
        return
    executor = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        yield from _in_order(executor, settings, batches, num_workers)
    finally:
        executor.shutdown(cancel_futures=True)


def _in_order(
    executor: ProcessPoolExecutor,
    settings: EncodeSettings,
    batches: Iterable[RecordBatch],
    num_workers: int,
) -> Generator[EncodedBatch, None, None]:
    under_way: deque[Future[EncodedBatch]] = deque()
    for batch in batches:
        under_way.append(executor.submit(encode_batch, settings, batch))
        if len(under_way) >= num_workers * _BATCHES_UNDER_WAY_PER_WORKER:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
