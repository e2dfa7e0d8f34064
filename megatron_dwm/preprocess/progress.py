"""Progress over input files: a bar on a terminal, a plain line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

_LINE_INTERVAL_S = 30.0


@dataclass(kw_only=True)
class ByteProgress:
    """Counts bytes of input and documents; call `advance` after every batch."""

    total_bytes: int
    bar: tqdm | None
    done_bytes: int = 0
    documents: int = 0
    last_line_s: float = 0.0

    def advance(self, num_bytes: int, documents: int) -> None:
        """Count a batch of documents and the bytes of input that it took."""
        self.done_bytes += num_bytes
        self.documents += documents
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.documents} documents", refresh=False)
            self.bar.update(num_bytes)
        elif time.monotonic() - self.last_line_s >= _LINE_INTERVAL_S:
            self.last_line_s = time.monotonic()
            percent = 100 * self.done_bytes / max(self.total_bytes, 1)
            print(f"{self.documents} documents, {percent:.0f} % of the input", flush=True)


@contextmanager
def progress_over(total_bytes: int) -> Iterator[ByteProgress]:
    """Show progress over `total_bytes` of input files (of compressed ones their size on disk)."""
    if not sys.stderr.isatty():
        yield ByteProgress(total_bytes=total_bytes, bar=None, last_line_s=time.monotonic())
        return
    with tqdm(total=total_bytes, unit="B", unit_scale=True) as bar:
        yield ByteProgress(total_bytes=total_bytes, bar=bar)
