"""The rows of `weights/*.parquet` as arrays, a batch at a time (weight_stream.py reads them)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_dwm.report.weight_stream import WeightFiles, codes, stream, weight_files

SOURCES = ("training", "update", "target")
"""what a row's ids number, by the code in `WeightBatch.source_R`"""
TRAINING, UPDATE, TARGET = range(3)
UNKNOWN = -1
"""document of a row whose file has no such column"""
_COLUMNS = ("step", "stage", "source", "document_id", "domain", "tokens", "weight", "alignment")


@dataclass(frozen=True, kw_only=True)
class WeightBatch:
    """R recorded weights."""

    step_R: np.ndarray
    stage_R: np.ndarray
    source_R: np.ndarray
    """an index into `SOURCES`"""
    document_R: np.ndarray
    domain_R: np.ndarray
    """an index into `WeightRows.domains`"""
    tokens_R: np.ndarray
    """float64; 1 where they are not recorded"""
    weight_R: np.ndarray
    """float64, as are the alignments"""
    alignment_R: np.ndarray
    """NaN where there is none"""

    def where(self, chosen_R: np.ndarray) -> WeightBatch:
        """The chosen rows."""
        return WeightBatch(**{name: values[chosen_R] for name, values in vars(self).items()})

    @property
    def of_corpus_R(self) -> np.ndarray:
        """True for rows whose document is one of the training data, and known."""
        return (self.source_R != TARGET) & (self.document_R >= 0)


@dataclass(frozen=True, kw_only=True)
class WeightRows:
    """The rows of a run, and the names of the domains that were read so far."""

    files: WeightFiles
    _domains: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def open(run_dir: Path) -> WeightRows:
        """Find the files of a run; there may be none. Raises UserError if one is broken."""
        return WeightRows(files=weight_files(run_dir))

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, by their code."""
        return tuple(self._domains)

    @property
    def first_step(self) -> int:
        """The first step with weights, of at least one."""
        return int(self.files.steps[0])

    @property
    def last_step(self) -> int:
        """The last step with weights, of at least one."""
        return int(self.files.steps[-1])

    def batches(self) -> Iterator[WeightBatch]:
        """Read all rows that count, some at a time. Raises UserError if a file is broken.

        Rows whose weight is not a finite number are left out; the section Weights counts them. An
        alignment that is not finite counts as none.
        """
        for table in stream(self.files, _COLUMNS):
            rows = WeightBatch(
                step_R=_integers(table["step"], 0),
                stage_R=_integers(table["stage"], 1),
                source_R=_sources(table["source"]),
                document_R=_integers(table["document_id"], UNKNOWN),
                domain_R=codes(table["domain"], self._domains),
                tokens_R=_integers(table["tokens"], 1).astype(np.float64),
                weight_R=_floats(table["weight"]),
                alignment_R=_finite(_floats(table["alignment"])),
            )
            finite_R = np.isfinite(rows.weight_R)
            yield rows if finite_R.all() else rows.where(finite_R)


def _integers(column: pa.ChunkedArray, missing: int) -> np.ndarray:
    return pc.fill_null(column, missing).to_numpy()


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.cast(column, pa.float64()), np.nan).to_numpy()


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _sources(column: pa.ChunkedArray) -> np.ndarray:
    """Returns the codes of the rows' sources; one that is not known counts as training."""
    names: dict[str, int] = {}
    found = codes(column, names)
    known = [SOURCES.index(name) if name in SOURCES else TRAINING for name in names]
    return np.array(known, dtype=np.int64)[found] if len(found) else found
