"""Encoding in several threads, results in the order of the input.

Threads, not processes: tokenizing frees Python's lock, so nothing has to be copied from process to
process and a worker costs only its tokenizer's cache. Parsing holds the lock for about a tenth of
the time, which limits one process to some eight busy threads; beyond that, run shards side by side.

Each worker has at most a few chunks waiting, and a large chunk is encoded alone, so memory does not
grow with the corpus.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_dwm.preprocess.encode.encoder import EncodeSettings, encode_chunk
from megatron_dwm.preprocess.records import Chunk, EncodedChunk
from megatron_dwm.tokenizer import Engine

_CHUNKS_AHEAD = 2
_LARGE_CHUNK_BYTES = 16 << 20
"""a chunk larger than this (it has a large document) is encoded alone"""


def encode_all(
    settings: EncodeSettings,
    build_engine: Callable[[], Engine],
    chunks: Iterable[Chunk],
    *,
    num_workers: int,
) -> Generator[EncodedChunk, None, None]:
    """Encode all chunks; yields them in order."""
    own = threading.local()

    def encode(chunk: Chunk) -> EncodedChunk:
        if not hasattr(own, "engine"):
            own.engine = build_engine()
        return encode_chunk(settings, own.engine, chunk)

    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")
    waiting: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            alone = chunk.size_bytes > _LARGE_CHUNK_BYTES
            while waiting and (alone or len(waiting) >= num_workers + _CHUNKS_AHEAD):
                yield waiting.popleft().result()
            waiting.append(executor.submit(encode, chunk))
            if alone:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
