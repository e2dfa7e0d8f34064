"""Text that is not trained on: the target's validation set, and held-out text by domain.

Both keep all rows in memory. `ValidationSet` hands out endless shuffled batches by number;
`EvaluationSet` goes through its rows once, in order, with one domain a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig, EvaluationConfig, ValidationConfig
from megatron_dwm.data.batch import UNKNOWN_DOMAIN, Batch
from megatron_dwm.data.packing import Rows, pack_dense, row_of_last_word
from megatron_dwm.data.passages import Passage, bare_text, read_passages

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer


class ValidationSet:
    """Shuffled batches of the target text; batch k depends on (seed, k, batch size) alone."""

    def __init__(
        self, validation: ValidationConfig, data: DataConfig, tokenizer: Tokenizer, *, seed: int
    ) -> None:
        """Read and pack the file `validation.path`.

        Raises:
            UserError: the path is empty, the file is missing, empty or broken (with its line), or
                no passage has a token that could carry loss.
        """
        if validation.path is None:
            raise UserError("validation.path is empty: name a JSON Lines file of target text")
        keys = (data.domain_key, "domain")
        passages = list(read_passages(validation.path, "validation.path", keys))
        self._domain_of_passage = [p.domain or UNKNOWN_DOMAIN for p in passages]
        self._texts = frozenset(bare_text(p.text) for p in passages)
        if validation.loss_on == "all":
            rows = _dense_rows(enumerate(passages), tokenizer, data.sequence_length)
        else:
            rows = _last_word_rows(passages, tokenizer, data.sequence_length)
        if rows is None:
            raise UserError(
                f"{validation.path} (validation.path): no passage has a token that could carry loss"
            )
        self._rows = rows
        self._seed = seed

    @property
    def num_rows(self) -> int:
        """Rows in one pass."""
        return len(self._rows)

    def batch(self, k: int, batch_size: int, num_padding: int = 0) -> Batch:
        """Batch number `k` (from 0): rows k * batch_size and after of endless shuffled passes.

        A batch of at most `num_rows` has no row twice: where it reaches over the border of two
        passes it takes the first rows of the later one that it does not have already.

        num_padding: rows without loss to add, with sample id `NO_ROW`.
        """
        ids = self._ids(k, batch_size)
        domains = [self._domain_of_passage[self._rows.documents[i]] for i in ids]
        return self._rows.batch(ids, domains, num_padding)

    def num_shared(self, texts: Sequence[str]) -> int:
        """How many of `texts` (`bare_text`) are passages of the target too; empty ones are none."""
        return sum(1 for text in texts if text and text in self._texts)

    def _ids(self, k: int, batch_size: int) -> list[int]:
        first_pass, place = divmod(k * batch_size, self.num_rows)
        ids = self._order_of_pass(first_pass)[place : place + batch_size].tolist()
        number = first_pass
        while len(ids) < batch_size:
            number += 1
            had = set(ids) if batch_size <= self.num_rows else ()
            order = [row for row in self._order_of_pass(number).tolist() if row not in had]
            ids += order[: batch_size - len(ids)]
        return ids

    def _order_of_pass(self, number: int) -> np.ndarray:
        return np.random.default_rng([self._seed, number]).permutation(self.num_rows)


class EvaluationSet:
    """Held-out text, packed domain by domain, read once through."""

    def __init__(
        self, evaluation: EvaluationConfig, data: DataConfig, tokenizer: Tokenizer
    ) -> None:
        """Read and pack the file `evaluation.path`.

        Raises:
            UserError: the path is empty, the file is missing, empty or broken, a line has no
                domain (with its number), or no passage has any tokens.
        """
        path = evaluation.path
        if path is None:
            raise UserError("evaluation.path is empty: name a JSON Lines file of held-out text")
        by_domain: dict[str, list[tuple[int, Passage]]] = {}
        keys = (data.domain_key,)
        for number, passage in enumerate(read_passages(path, "evaluation.path", keys)):
            if passage.domain is None:
                raise UserError(
                    f"{path} line {passage.line} has no {data.domain_key} (data.domain_key): "
                    "held-out text needs a domain in every line"
                )
            by_domain.setdefault(passage.domain, []).append((number, passage))
        self.texts = [bare_text(p.text) for found in by_domain.values() for _, p in found]
        packed = {
            name: _dense_rows(by_domain[name], tokenizer, data.sequence_length)
            for name in sorted(by_domain)
        }
        filled = {name: rows for name, rows in packed.items() if rows is not None}
        if not filled:
            raise UserError(f"{path} (evaluation.path): no passage has any tokens")
        self.domains = list(filled)
        self._rows = Rows.stack(list(filled.values()))
        self._domain_of_row = [name for name, rows in filled.items() for _ in range(len(rows))]

    @property
    def num_rows(self) -> int:
        """Rows in the set."""
        return len(self._rows)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All rows in order, `batch_size` at a time; rows added to the last batch have no loss.

        Such rows have sample id `NO_ROW`, and every row has exactly one domain.
        """
        for start in range(0, self.num_rows, batch_size):
            ids = range(start, min(start + batch_size, self.num_rows))
            domains = [self._domain_of_row[i] for i in ids]
            yield self._rows.batch(ids, domains, num_padding=batch_size - len(ids))


def _dense_rows(
    passages: Iterator[tuple[int, Passage]] | list[tuple[int, Passage]],
    tokenizer: Tokenizer,
    sequence_length: int,
) -> Rows | None:
    """Packed rows of the passages that have tokens; None when none has."""
    encoded = [(number, tokenizer.encode(passage.text)) for number, passage in passages]
    around = tokenizer.around
    filled = [(number, [*around.before, *ids, *around.after]) for number, ids in encoded if ids]
    return pack_dense(filled, sequence_length, tokenizer.eod_id) if filled else None


def _last_word_rows(
    passages: list[Passage], tokenizer: Tokenizer, sequence_length: int
) -> Rows | None:
    """A row for each passage whose last word can carry loss; None when there is none."""
    rows = [
        row_of_last_word(number, passage.text, tokenizer, sequence_length)
        for number, passage in enumerate(passages)
    ]
    present = [row for row in rows if row is not None]
    return Rows.stack(present) if present else None
