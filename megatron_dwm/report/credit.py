"""Credit of documents and domains over the run, as a table and as a Parquet file.

The number is the sum of eta s over the recorded updates, defined in document_sums.py. Only recorded
updates count: those of a step that is no multiple of the intervals, or of a batch part that was not
probed, are not in it, and nothing is scaled up for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dwm.files.atomic import new_file
from megatron_dwm.report.corpus import Corpus
from megatron_dwm.report.document_scores import read_sources
from megatron_dwm.report.document_sums import DocumentSums

_CHUNK = 1 << 18
_SCHEMA = pa.schema(
    [
        ("document_id", pa.int64()),
        ("domain", pa.string()),
        ("source_file", pa.string()),
        ("record", pa.int64()),
        ("credit", pa.float64()),
        ("loss_drop", pa.float64()),
        ("mean_alignment", pa.float64()),
        ("mean_weight", pa.float64()),
        ("times_recorded", pa.int64()),
        ("times_in_updates", pa.int64()),
        ("tokens", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class DomainCredit:
    """The sums of one domain's documents.

    credit: sum of eta s. drop: in nats, None if shares of the batch are not known. rows: recorded
    weights; aligned: those with an alignment.
    """

    domain: str
    documents: int
    rows: int
    aligned: int
    weight: float
    credit: float
    drop: float | None


def credit_by_domain(sums: DocumentSums, domains: Sequence[str]) -> list[DomainCredit]:
    """Returns the credits of all domains, the largest first.

    sums: one entry a document (`over_stages`).
    """
    size = len(domains)

    def total(values_K: np.ndarray) -> np.ndarray:
        return np.bincount(sums.domain_K, values_K, size)

    documents, rows, aligned = total(np.ones(len(sums))), total(sums.rows_K), total(sums.aligned_K)
    tokens = total(sums.tokens_K)
    weight = total(sums.weight_K * sums.tokens_K) / np.maximum(tokens, 1.0)
    credit, drop = total(sums.credit_K), total(sums.drop_K)
    found = [
        DomainCredit(
            domain=name,
            documents=int(documents[i]),
            rows=int(rows[i]),
            aligned=int(aligned[i]),
            weight=float(weight[i]),
            credit=float(credit[i]),
            drop=None if np.isnan(drop[i]) else float(drop[i]),
        )
        for i, name in enumerate(domains)
        if documents[i]
    ]
    return sorted(found, key=lambda each: -each.credit)


def count_updates(lines: Iterable[Mapping[str, Any]]) -> int:
    """Returns the weighting updates of a run with alignments, from its metrics.jsonl."""
    return sum(
        line.get("phase") == "weighting" and line.get("alignment_mean") is not None
        for line in lines
    )


def write_credit(path: Path, sums: DocumentSums, domains: Sequence[str], corpus: Corpus) -> None:
    """Write a row a document, in the order of the documents. Raises OSError.

    sums: one entry a document (`over_stages`). Memory: some hundred thousand rows.
    """
    names = pa.array(list(domains), pa.string())
    with new_file(path) as partial, pq.ParquetWriter(partial, _SCHEMA) as writer:
        for first in range(0, max(1, len(sums)), _CHUNK):
            part = sums.where(np.arange(first, min(first + _CHUNK, len(sums))))
            source, record = read_sources(corpus, part.document_K)
            without = part.aligned_K == 0
            columns = [
                pa.array(part.document_K),
                names.take(pa.array(part.domain_K)),
                source,
                record,
                pa.array(part.credit_K, mask=without),
                pa.array(part.drop_K, mask=without | np.isnan(part.drop_K)),
                pa.array(part.alignment_K, mask=without),
                pa.array(part.weight_K),
                pa.array(part.rows_K),
                pa.array(part.aligned_K),
                pa.array(part.tokens_K.astype(np.int64)),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA))
