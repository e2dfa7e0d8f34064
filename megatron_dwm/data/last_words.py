"""The last word of every held-out passage, as rows that carry nothing else (LAMBADA's question).

One passage a row, cut on the left to fit. All rows are kept in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.batch import UNKNOWN_DOMAIN, Batch
from megatron_dwm.data.packing import Rows, row_of_last_word
from megatron_dwm.data.passages import read_passages

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer


class LastWords:
    """A row for every passage whose last word can be asked for, read once through."""

    def __init__(self, path: str, data: DataConfig, tokenizer: Tokenizer) -> None:
        """Read JSON Lines file `path` (`evaluation.path`), with a `text` in every line.

        Passages without a word that could be asked for are left out, be it all of them.

        Raises:
            UserError: the file is missing, empty or broken (with its line).
        """
        rows, domains = [], []
        for number, passage in enumerate(
            read_passages(path, "evaluation.path", (data.domain_key,))
        ):
            row = row_of_last_word(number, passage.text, tokenizer, data.sequence_length)
            if row is not None:
                rows.append(row)
                domains.append(passage.domain or UNKNOWN_DOMAIN)
        self._rows = rows
        self._domain_of_row = domains
        self.domains = sorted(set(domains))

    @property
    def num_rows(self) -> int:
        """Passages asked about."""
        return len(self._rows)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows in order, `batch_size` at a time; rows added to the last batch carry nothing."""
        for start in range(0, self.num_rows, batch_size):
            ids = range(start, min(start + batch_size, self.num_rows))
            domains = [self._domain_of_row[i] for i in ids]
            rows = Rows.stack(self._rows[ids.start : ids.stop])
            yield rows.batch(range(len(ids)), domains, num_padding=batch_size - len(ids))
