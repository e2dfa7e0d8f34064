"""How far a long pass over files is: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

_LINE_INTERVAL_S = 30.0


@dataclass(kw_only=True)
class Progress:
    """Counts bytes of input and documents; `advance` after every batch."""

    total_bytes: int
    bar: tqdm | None
    done_bytes: int = 0
    documents: int = 0
    last_line_s: float = 0.0

    def advance(self, num_bytes: int, documents: int) -> None:
        """Add what a batch took."""
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
def progress_over(total_bytes: int) -> Iterator[Progress]:
    """Progress over `total_bytes` of input files (compressed size, if they are)."""
    if not sys.stderr.isatty():
        yield Progress(total_bytes=total_bytes, bar=None, last_line_s=time.monotonic())
        return
    with tqdm(total=total_bytes, unit="B", unit_scale=True) as bar:
        yield Progress(total_bytes=total_bytes, bar=bar)
