"""Encoding in several threads, results in the order of the input.

Threads, not processes: tokenizing frees Python's lock, so nothing has to be copied from process to
process and a worker costs only its tokenizer's cache. What holds the lock (parsing, about a tenth
of the time) limits one process to some eight busy threads; beyond that, run shards side by side.

At most a few chunks for each worker are under way, and no more bytes than a bound, so memory does
not grow with the corpus.
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
"""a chunk with a document as large as this is encoded alone"""


def encode_all(
    settings: EncodeSettings,
    build_engine: Callable[[], Engine],
    chunks: Iterable[Chunk],
    *,
    num_workers: int,
) -> Generator[EncodedChunk, None, None]:
    """Encoded chunks in order."""
    own = threading.local()

    def encode(chunk: Chunk) -> EncodedChunk:
        if not hasattr(own, "engine"):
            own.engine = build_engine()
        return encode_chunk(settings, own.engine, chunk)

    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")
    under_way: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            alone = chunk.size_bytes > _LARGE_CHUNK_BYTES
            while under_way and (alone or len(under_way) >= num_workers + _CHUNKS_AHEAD):
                yield under_way.popleft().result()
            under_way.append(executor.submit(encode, chunk))
            if alone:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
