"""QuRating (Wettig et al. 2024): documents drawn with probability proportional to exp(score / tau).

The scores are a numeric column of the sidecar, standardized over the documents that have tokens.
The paper's code, princeton-nlp/QuRating's data_tools/select_subset.py, divides the scores by the
temperature, adds Gumbel noise with --sample, sorts and takes documents until their tokens reach the
budget, the last one included; so does choice.py. It differs in this: there standardizing is an
option (--normalize), several columns may be added and a reference column subtracted, and domains
(--domain_field) always keep their parts of the data, where ours get those of --domain-shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dwm.config.errors import UserError
from megatron_dwm.selection.choice import Scores
from megatron_dwm.selection.pool import Pool
from megatron_dwm.selection.select import Progress


@dataclass(frozen=True, kw_only=True)
class QuRatingScores:
    """`select_data.py qurating`."""

    column: str
    lowest: bool = False
    name: str = "qurating"

    def options(self) -> dict[str, Any]:
        """The column, and if small values are better."""
        return {"column": self.column, **({"lowest": True} if self.lowest else {})}

    def scores(self, pool: Pool, progress: Progress, scratch: Path) -> Scores:  # noqa: ARG002
        """Standardized values of the column.

        Raises `UserError` for a column that is missing or no number, for a document with tokens
        whose value is null or not finite, and if all values are the same or too large to square.
        """
        where = f"{pool.dataset.paths.sidecar}: column {self.column}"
        return standardized(self._read(pool), pool, where)

    def _read(self, pool: Pool) -> np.ndarray:
        """The column as float64; null is NaN."""
        kind = pool.require_column(self.column, "--column")
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise UserError(
                f"{pool.dataset.paths.sidecar}: column {self.column} (--column) is of type {kind}; "
                "a number is needed"
            )
        sidecar = pool.require_sidecar("--column")
        values_D = np.concatenate([np.zeros(0), *_blocks(sidecar, self.column)])
        return -values_D if self.lowest else values_D


def standardized(values_D: np.ndarray, pool: Pool, where: str) -> Scores:
    """Returns scores of mean 0 and deviation 1 over the documents with tokens.

    where: what has the values, for messages.
    Raises `UserError` for a document with tokens whose value is not finite, and if all are equal.
    """
    eligible_D = pool.tokens_D > 0
    bad = np.flatnonzero(eligible_D & ~np.isfinite(values_D))
    if len(bad):
        value = values_D[bad[0]]
        raise UserError(
            f"{where} is {'null' if np.isnan(value) else value} in row {bad[0]} (from 0), one "
            f"of {len(bad)} such documents with tokens; a score is needed for each of them"
        )
    scored = values_D[eligible_D]
    if not len(scored) or scored.min() == scored.max():
        raise UserError(f"{where} has the same value in all documents; nothing to select by")
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = scored.mean(), scored.std()
    if not np.isfinite(deviation):
        raise UserError(f"{where} has values too large for their deviation; scale them down")
    return Scores(
        values_D=np.where(eligible_D, (values_D - mean) / deviation, 0.0),
        eligible_D=eligible_D,
        eligible_words="all documents",
    )


def _blocks(sidecar: pq.ParquetFile, column: str) -> list[np.ndarray]:
    groups = range(sidecar.num_row_groups)
    columns = (sidecar.read_row_group(group, columns=[column]).column(0) for group in groups)
    return [column.cast(pa.float64(), safe=False).to_numpy() for column in columns]
