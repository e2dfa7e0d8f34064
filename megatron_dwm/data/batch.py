"""A batch: the input of every model, its units, and the origin of each of them.

B rows of S tokens. A unit is what gets a weight: a row, or a document's piece in a row. All tensors
are on one device; slices share memory with their batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.model.passes.units import Units

NO_ROW = -1
"""sample and document id of a padding row"""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of S tokens, the tokens that follow them, and the origins of their U units."""

    tokens_BS: Tensor
    """int64, what the model reads"""
    labels_BS: Tensor
    """int64, the token after each of `tokens_BS`"""
    loss_mask_BS: Tensor
    """float32, 1 where the label counts in the loss, else 0"""
    position_ids_BS: Tensor
    """int64, 0 to S - 1 in every row"""
    sample_ids_B: Tensor
    """int64, the row's number in its stream; `NO_ROW` for padding"""
    document_ids_U: Tensor
    """int64, the unit's document; of a row, the document with most of its tokens; `NO_ROW` for
    padding; if tokens are units, one a row"""
    domains: tuple[str, ...]
    """one name a unit: the domain of that document"""
    values_U: Tensor | None = None
    """float32, the unit's value: that of its document, or of a row the mean over its tokens; None
    if the method reads no values (values.py)"""
    reference_losses_BS: Tensor | None = None
    """float32, a reference's loss of each label, 0 where the label does not count; None if the
    method reads no file of them (token_losses.py)"""
    borders_BS: Tensor | None = None
    """int64, the number of each token's document piece in its row, from 0; attention stops where it
    changes; None: it does not stop"""
    units_BS: Tensor | None = None
    """int64, the number of each token's unit in its row, from 0; -1 for padding; None: every row is
    a unit"""
    equal_shares: bool = False
    """True: units of `units_BS` count the same; False: in proportion to their counted tokens"""
    tokens_are_units: bool = False
    """True: every token is a unit, of which those count whose label counts"""

    @property
    def size(self) -> int:
        """Rows in the batch (B)."""
        return self.tokens_BS.shape[0]

    @cached_property
    def origins_per_row(self) -> list[int]:
        """Number of units of every row that have an origin; 1 if tokens are units."""
        if self.units_BS is None:
            return [1] * self.size
        return (self.units_BS.amax(dim=1) + 1).tolist()

    @property
    def units_per_row(self) -> list[int]:
        """Number of units in every row."""
        length = self.tokens_BS.shape[1]
        return [length] * self.size if self.tokens_are_units else self.origins_per_row

    @cached_property
    def units(self) -> Units:
        """What gets a weight, in the order of the rows."""
        if self.tokens_are_units:
            mask_BS = self.loss_mask_BS
            numbers_T = torch.arange(mask_BS.numel(), device=mask_BS.device)
            return Units(
                count=mask_BS.numel(),
                numbers_BS=numbers_T.view_as(mask_BS),
                sizes_U=mask_BS.flatten(),
            )
        if self.units_BS is None:
            return Units(count=self.size)
        # Not from `units_per_row`: the host's numbers would have to be copied to the device.
        per_row_B = self.units_BS.amax(dim=1) + 1
        before_B1 = (per_row_B.cumsum(dim=0) - per_row_B)[:, None]
        numbers_BS = torch.where(self.units_BS < 0, -1, self.units_BS + before_B1)
        units = Units(count=sum(self.units_per_row), numbers_BS=numbers_BS)
        counts_U = units.sum_of_rows(self.loss_mask_BS)
        # A unit without a counted token has no loss, so it has no share either.
        return replace(units, sizes_U=(counts_U > 0).float() if self.equal_shares else counts_U)

    def rows(self, start: int, stop: int, step: int = 1) -> Batch:
        """Returns every `step`-th of the rows `start` to `stop - 1`; they share its memory."""
        assert 0 <= start <= stop <= self.size, (start, stop, self.size)
        chosen = self._units_of(range(start, stop, step))
        tensors = {name: value[start:stop:step] for name, value in self._row_tensors().items()}
        tensors |= {name: value[chosen] for name, value in self._unit_tensors().items()}
        others = self._with(tensors, _names(self.domains, chosen))
        return others._with_origins(self.origins_per_row[start:stop:step])

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on `device`."""
        tensors = {**self._row_tensors(), **self._unit_tensors()}
        moved = {name: _on_device(value, device) for name, value in tensors.items()}
        return self._with(moved, self.domains)._with_origins(self.origins_per_row)

    def micro_batches(self, size: int) -> list[Batch]:
        """Returns the rows in order, `size` at a time; `size` must divide the batch."""
        assert size > 0 and self.size % size == 0, (size, self.size)
        return [self.rows(start, start + size) for start in range(0, self.size, size)]

    @staticmethod
    def concatenate(batches: Sequence[Batch]) -> Batch:
        """Returns one batch with the rows of `batches` (at least one), in order.

        All of them have borders or none has, and the same holds for units inside rows and values.
        """
        assert batches, "concatenate needs at least one batch"
        parts = [{**batch._row_tensors(), **batch._unit_tensors()} for batch in batches]
        assert all(tensors.keys() == parts[0].keys() for tensors in parts)
        found = batches[0]._with(
            {name: torch.cat([tensors[name] for tensors in parts]) for name in parts[0]},
            tuple(name for batch in batches for name in batch.domains),
        )
        return found._with_origins([n for batch in batches for n in batch.origins_per_row])

    def _with(self, tensors: dict[str, Tensor], domains: tuple[str, ...]) -> Batch:
        """Returns a batch of other rows, by the names of all its tensors."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes, domains=domains)

    def _with_origins(self, origins_per_row: list[int]) -> Batch:
        """Returns the batch itself, which now need not ask the device for these numbers."""
        vars(self)["origins_per_row"] = origins_per_row
        return self

    def _units_of(self, rows: range) -> slice | list[int]:
        """Returns the numbers of the units in `rows`; a slice needs no copy to the device."""
        if self.units_BS is None:
            return slice(rows.start, rows.stop, rows.step)
        firsts = [0]
        for count in self.origins_per_row:
            firsts.append(firsts[-1] + count)
        if rows.step == 1:
            return slice(firsts[rows.start], firsts[rows.stop])
        return [unit for row in rows for unit in range(firsts[row], firsts[row + 1])]

    def _row_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that have a row for each row of the batch."""
        return {name: value for name, value in self._tensors() if not name.endswith("_U")}

    def _unit_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that have a row for each unit with an origin."""
        return {name: value for name, value in self._tensors() if name.endswith("_U")}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), Tensor):
                yield field.name, value


def _on_device(value: Tensor, device: torch.device | str) -> Tensor:
    """Returns the tensor on `device`; the host does not wait for a GPU (not run)."""
    if torch.device(device).type == "cuda" and not value.is_cuda:
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def _names(domains: tuple[str, ...], chosen: slice | list[int]) -> tuple[str, ...]:
    if isinstance(chosen, slice):
        return domains[chosen]
    return tuple(domains[unit] for unit in chosen)
