"""Streams `token_weights/*.parquet`: what methods that weigh tokens kept inside every row.

Cost: two passes over the files. Memory: a batch of rows, and the rows that are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_COLUMNS = ("step", "domain", "counted", "kept", "document_id", "token_ids", "token_weights")
_LISTS = ("token_weights", "token_losses", "token_excess")
_EXCESS_BINS = 60
_INTERVALS = 40
ROWS_IN_BATCH = 1 << 12


@dataclass(frozen=True, kw_only=True)
class KeptShares:
    """Tokens that count, and those that were kept, by domain and interval of steps.

    step_T: mean step of the interval's rows.
    """

    domains: tuple[str, ...]
    step_T: np.ndarray
    counted_TD: np.ndarray
    kept_TD: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ExcessHistogram:
    """Recorded tokens by their excess loss, in nats; the outermost bins have all beyond."""

    edges: np.ndarray
    kept: np.ndarray
    dropped: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One row of a batch with its tokens; excess is None without a reference."""

    step: int
    domain: str
    document: int
    ids: list[int]
    weights: list[float]
    losses: list[float]
    excess: list[float] | None


@dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """The readable files of a run's tokens; `notes` has a line for each that was left out."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]

    @staticmethod
    def open(run_dir: Path) -> TokenFiles:
        """Find the files of a run; there may be none."""
        found, notes = [], []
        for path in sorted((run_dir / "token_weights").glob("*.parquet")):
            try:
                missing = [n for n in _COLUMNS if n not in pq.read_schema(path).names]
            except (pa.ArrowException, OSError) as error:
                missing = [str(error).splitlines()[0]]
            if missing:
                notes.append(f"{path.name} is left out: it has no {missing[0]}")
            else:
                found.append(path)
        return TokenFiles(paths=tuple(found), notes=tuple(notes))

    def tables(self, columns: tuple[str, ...]) -> Iterator[pa.Table]:
        """Read these columns of all rows, some rows at a time."""
        for path in self.paths:
            file = pq.ParquetFile(path)
            known = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(ROWS_IN_BATCH, columns=known):
                yield pa.Table.from_batches([batch])


def kept_shares(files: TokenFiles) -> KeptShares | None:
    """Count the tokens of all rows; None if there is no row."""
    found: dict[tuple[int, str], np.ndarray] = {}
    for table in files.tables(("step", "domain", "counted", "kept")):
        table = table.set_column(1, "domain", pc.cast(table["domain"], pa.string()))
        sums = table.group_by(["step", "domain"]).aggregate([("counted", "sum"), ("kept", "sum")])
        for row in sums.to_pylist():
            key = (row["step"], row["domain"])
            counts = np.array([row["counted_sum"], row["kept_sum"]])
            found[key] = found.get(key, np.zeros(2, np.int64)) + counts
    if not found:
        return None
    steps = sorted({step for step, _ in found})
    domains = tuple(sorted({domain for _, domain in found}))
    intervals = np.array_split(np.array(steps), min(_INTERVALS, len(steps)))
    at = {int(step): i for i, part in enumerate(intervals) for step in part}
    counts = np.zeros((2, len(intervals), len(domains)), np.int64)
    for (step, domain), pair in found.items():
        counts[:, at[step], domains.index(domain)] += pair
    return KeptShares(
        domains=domains,
        step_T=np.array([part.mean() for part in intervals]),
        counted_TD=counts[0],
        kept_TD=counts[1],
    )


def excess_histogram(files: TokenFiles) -> ExcessHistogram | None:
    """Count recorded tokens by excess loss; None if no row has one.

    The range is that of all but a hundredth of a sample of the tokens.
    """
    sample = [excess[:: max(1, len(excess) // 4096)] for excess, _ in _excess(files)]
    if not sample or not len(every := np.concatenate(sample)):
        return None
    low, high = np.quantile(every, [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1e-6, _EXCESS_BINS + 1)
    counts = np.zeros((2, _EXCESS_BINS), np.int64)
    for excess, weights in _excess(files):
        at = np.clip(np.searchsorted(edges, excess, side="right") - 1, 0, _EXCESS_BINS - 1)
        for number, chosen in enumerate((weights > 0, weights == 0)):
            counts[number] += np.bincount(at[chosen], minlength=_EXCESS_BINS)
    return ExcessHistogram(edges=edges, kept=counts[0], dropped=counts[1])


def rows_in_full(files: TokenFiles, count: int) -> list[TokenRow]:
    """Returns at most `count` recorded rows with their tokens, at even distances over the run."""
    total = sum(
        len(table) - table["token_ids"].null_count for table in files.tables(("token_ids",))
    )
    wanted = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
    found, number = [], 0
    for table in files.tables((*_COLUMNS, *_LISTS[1:])):
        table = table.filter(pc.is_valid(table["token_ids"]))
        chosen = [at for at in range(len(table)) if number + at in wanted]
        found += [_row(row) for row in table.take(pa.array(chosen, pa.int64())).to_pylist()]
        number += len(table)
    return found


def _row(row: dict[str, Any]) -> TokenRow:
    return TokenRow(
        step=row["step"],
        domain=row["domain"] or "unknown",
        document=row["document_id"],
        ids=row["token_ids"],
        weights=row["token_weights"],
        losses=row.get("token_losses") or [float("nan")] * len(row["token_ids"]),
        excess=row.get("token_excess"),
    )


def _excess(files: TokenFiles) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields excess and weight of the recorded tokens whose loss counts."""
    for table in files.tables(_LISTS):
        if "token_excess" not in table.column_names:
            return
        table = table.filter(pc.is_valid(table["token_excess"]))
        excess, weights = (
            pc.list_flatten(table[name]).to_numpy() for name in ("token_excess", "token_weights")
        )
        yield excess[weights >= 0], weights[weights >= 0]
