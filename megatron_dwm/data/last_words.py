"""The last word of every held-out passage, to be predicted from the rest, as in LAMBADA.

One passage per row, cut on the left to fit. All rows are kept in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_dwm.config.schema import DataConfig, EvaluationConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.held_out import held_out_passages
from megatron_dwm.data.packing import PackedSequences, pack_last_word

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer


class LastWords:
    """A row for every passage whose last word can be predicted, in order."""

    def __init__(
        self, evaluation: EvaluationConfig, data: DataConfig, tokenizer: Tokenizer
    ) -> None:
        """Read the held-out files.

        Passages without a word that could be predicted are left out, even if these are all.

        Raises:
            UserError: as `held_out_passages`.
        """
        rows, domains, kept = [], [], set()
        for number, (domain, passage) in enumerate(held_out_passages(evaluation, data)):
            row = pack_last_word(number, passage.text, tokenizer, data.sequence_length)
            domains.append(domain)
            if row is not None:
                rows.append(row)
                kept.add(domains[-1])
        self._rows = rows
        self._domain_of_passage = domains
        self.domains = sorted(kept)

    @property
    def num_rows(self) -> int:
        """Number of passages whose last word is predicted."""
        return len(self._rows)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields all rows in order, `batch_size` at a time; padding rows have no loss."""
        for start in range(0, self.num_rows, batch_size):
            ids = range(start, min(start + batch_size, self.num_rows))
            rows = PackedSequences.stack(self._rows[ids.start : ids.stop])
            padding = batch_size - len(ids)
            yield rows.batch(range(len(ids)), self._domain_of_passage, padding)
