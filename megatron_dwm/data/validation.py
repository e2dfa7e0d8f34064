"""Text that the LLM does not train on: the target's validation set, and held-out text by domain.

Both keep all rows in memory. `ValidationSet` gives endless shuffled batches by number;
`EvaluationSet` gives its rows once, in order, with one domain per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig, EvaluationConfig, ValidationConfig
from megatron_dwm.data.batch import Batch
from megatron_dwm.data.held_out import held_out_passages
from megatron_dwm.data.packing import PackedSequences, pack_dense, pack_last_word
from megatron_dwm.data.passages import Passage, bare_text, read_passages
from megatron_dwm.data.pieces import ROWS, DocumentRules
from megatron_dwm.files.sidecar_columns import UNKNOWN_DOMAIN

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer


class ValidationSet:
    """Shuffled batches of the target text; batch k depends only on (seed, k, batch size)."""

    def __init__(
        self,
        validation: ValidationConfig,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        seed: int,
        rules: DocumentRules = ROWS,
    ) -> None:
        """Read and pack the file `validation.path`.

        rules: how passages inside a row are told apart.

        Raises:
            UserError: the path is empty, the file is missing, empty or broken (with its line), or
                no passage has a token that could count in the loss.
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
        self._rules = rules

    @property
    def num_rows(self) -> int:
        """Rows in one epoch."""
        return len(self._rows)

    def batch(self, k: int, batch_size: int, num_padding: int = 0) -> Batch:
        """Returns batch `k` (from 0): the rows from k * batch_size on, of endless shuffled epochs.

        A batch of at most `num_rows` has no row twice: if it extends into the next epoch, it has
        the first rows of that epoch that are not in the batch yet.

        num_padding: rows without loss to add, with sample id `NO_ROW`.
        """
        ids = self._ids(k, batch_size)
        return self._rows.batch(ids, self._domain_of_passage, num_padding, self._rules)

    def num_shared(self, texts: Sequence[str]) -> int:
        """Returns how many non-empty `texts` (`bare_text`) are passages of the target."""
        return sum(1 for text in texts if text and text in self._texts)

    def _ids(self, k: int, batch_size: int) -> list[int]:
        epoch, start = divmod(k * batch_size, self.num_rows)
        ids = self._order(epoch)[start : start + batch_size].tolist()
        while len(ids) < batch_size:
            epoch += 1
            had = set(ids) if batch_size <= self.num_rows else ()
            order = [row for row in self._order(epoch).tolist() if row not in had]
            ids += order[: batch_size - len(ids)]
        return ids

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)


class EvaluationSet:
    """Held-out text, packed domain by domain, in order."""

    def __init__(
        self,
        evaluation: EvaluationConfig,
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        stop_attention: bool = False,
    ) -> None:
        """Read and pack the held-out files.

        stop_attention: attention stops at the borders of passages. All their tokens count in any
            case, so that losses of runs can be compared.

        Raises:
            UserError: as `held_out_passages`, or no passage has any tokens.
        """
        self._rules = DocumentRules(stop_attention=stop_attention)
        self._domain_of_passage: list[str] = []
        by_domain: dict[str, list[tuple[int, Passage]]] = {}
        for number, (domain, passage) in enumerate(held_out_passages(evaluation, data)):
            self._domain_of_passage.append(domain)
            by_domain.setdefault(domain, []).append((number, passage))
        self.texts = [bare_text(p.text) for found in by_domain.values() for _, p in found]
        packed = {
            name: _dense_rows(by_domain[name], tokenizer, data.sequence_length)
            for name in sorted(by_domain)
        }
        filled = {name: rows for name, rows in packed.items() if rows is not None}
        if not filled:
            files = ", ".join([*filter(None, [evaluation.path]), *evaluation.sets.values()])
            raise UserError(f"{files} (held-out text): no passage has any tokens")
        self.domains = list(filled)
        self._rows = PackedSequences.stack(list(filled.values()))

    @property
    def num_rows(self) -> int:
        """Number of rows in the set."""
        return len(self._rows)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields all rows in order, `batch_size` at a time, with padding in the last batch.

        Padding has no loss and sample id `NO_ROW`. Every row has exactly one domain.
        """
        for start in range(0, self.num_rows, batch_size):
            ids = range(start, min(start + batch_size, self.num_rows))
            padding = batch_size - len(ids)
            yield self._rows.batch(ids, self._domain_of_passage, padding, self._rules)


def _dense_rows(
    passages: Iterator[tuple[int, Passage]] | list[tuple[int, Passage]],
    tokenizer: Tokenizer,
    sequence_length: int,
) -> PackedSequences | None:
    """Pack the passages that have tokens; returns None if none has."""
    encoded = [(number, tokenizer.encode(passage.text)) for number, passage in passages]
    around = tokenizer.around
    filled = [(number, [*around.before, *ids, *around.after]) for number, ids in encoded if ids]
    return pack_dense(filled, sequence_length, tokenizer.eod_id) if filled else None


def _last_word_rows(
    passages: list[Passage], tokenizer: Tokenizer, sequence_length: int
) -> PackedSequences | None:
    """Returns a row for each passage whose last word can be a label; None if there is none."""
    rows = [
        pack_last_word(number, passage.text, tokenizer, sequence_length)
        for number, passage in enumerate(passages)
    ]
    present = [row for row in rows if row is not None]
    return PackedSequences.stack(present) if present else None
