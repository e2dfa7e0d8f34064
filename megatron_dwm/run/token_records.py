"""token_weights/*.parquet: what a step kept of every row where tokens are the units, and some rows
in full.

Methods that weigh tokens keep a fraction of them (weighting/excess_loss.py, blade.py). A row of a
table is a row of the batch. Counts are of all rows; the tokens themselves only of the first ones,
`logging.weights_token_rows`. Memory and messages: the losses of a global batch's tokens, once a
recorded step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from megatron_dwm.data import Batch, Origins
from megatron_dwm.run.parquet_records import ORIGIN_FIELDS, ParquetRecords, origin_columns
from megatron_dwm.runtime import Runtime
from megatron_dwm.training.weighed_units import WeighedUnits

# Reads the first rows of a global batch, given how many.
ReadRows = Callable[[int], Batch]

_TOKENS = pa.list_(pa.float32())
TOKEN_SCHEMA = pa.schema(
    [
        *ORIGIN_FIELDS,
        ("counted", pa.int32()),
        ("kept", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_weights", _TOKENS),
        ("token_losses", _TOKENS),
        ("token_excess", _TOKENS),
    ]
)
"""one row per row of the batch

counted: tokens of the row whose loss counts. kept: those of them with a weight above 0
token_ids: the token that every position predicts, to which weight, loss and excess belong; empty
    beyond the first rows
token_weights: -1 for a token whose loss does not count
token_excess: loss less the reference's, in nats; empty without a reference
"""
NOT_COUNTED = -1.0


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """What is recorded of a global batch of B rows, of which the first R in full.

    counted_B, kept_B: numbers of tokens. weights_RS, losses_RS, excess_RS: float32; weights are
    `NOT_COUNTED` where a token does not count; excess is None without a reference.
    """

    counted_B: Tensor
    kept_B: Tensor
    weights_RS: Tensor
    losses_RS: Tensor
    excess_RS: Tensor | None


def gather_token_weights(units: WeighedUnits, rows: int, runtime: Runtime) -> TokenWeights:
    """Gather what is recorded of a batch whose units are tokens, in its order (collective).

    rows: how many rows of the global batch to keep in full.
    """
    assert units.rows is not None and units.sizes_n is not None
    sizes_BS = units.sizes_n.view(units.rows, -1)
    counts_BS = sizes_BS > 0
    kept_BS = counts_BS & (units.weights_n.view_as(sizes_BS) > 0)
    of_rows = units.recorded()
    counted_B, kept_B = (
        of_rows.gather(found_BS.sum(dim=1), runtime) for found_BS in (counts_BS, kept_BS)
    )

    def first_rows(values_n: Tensor) -> Tensor:
        return units.gather(values_n, runtime).view(-1, sizes_BS.shape[1])[:rows].cpu()

    reference_n = units.reference_losses_n
    weights_n = units.weights_n.where(units.sizes_n > 0, NOT_COUNTED)
    return TokenWeights(
        counted_B=counted_B,
        kept_B=kept_B,
        weights_RS=first_rows(weights_n),
        losses_RS=first_rows(units.losses_n),
        excess_RS=None if reference_n is None else first_rows(units.losses_n - reference_n),
    )


class TokenRecorder:
    """Collects the weights of tokens and writes them, one Parquet file per checkpoint."""

    def __init__(self, run_dir: Path) -> None:
        self.records = ParquetRecords(run_dir / "token_weights", TOKEN_SCHEMA)

    def add(
        self, step: int, stage: int, origins: Origins, found: TokenWeights, read_rows: ReadRows
    ) -> None:
        """Keep the tokens of a global batch (main process)."""
        count, full = len(origins.domains), len(found.weights_RS)
        rest: list[Any] = [None] * (count - full)
        ids: list[Any] = read_rows(full).labels_BS.tolist() if full else []
        excess: list[Any] = [None] * full if found.excess_RS is None else found.excess_RS.tolist()
        columns = (
            *origin_columns(step, stage, origins),
            found.counted_B.tolist(),
            found.kept_B.tolist(),
            ids + rest,
            found.weights_RS.tolist() + rest,
            found.losses_RS.tolist() + rest,
            excess + rest,
        )
        self.records.keep(step, columns)
