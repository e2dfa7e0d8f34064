"""Scores and sources of documents: columns of the sidecars, or statistics of their texts.

Memory: one row group of a sidecar, and one value a document that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from megatron_dwm.files.sidecar_format import OWN_COLUMNS
from megatron_dwm.report.corpus import Corpus, Prefix
from megatron_dwm.report.document_texts import DocumentTexts
from megatron_dwm.report.score_correlation import Scores
from megatron_dwm.selection.statistics import STATISTICS, Texts
from megatron_dwm.selection.words import TextBatch

TOKENS_OF_TEXT = 2048
"""statistics are of as many tokens at a document's beginning"""


def score_columns(corpus: Corpus) -> list[str]:
    """Returns the numeric metadata columns of the sidecars, in their order."""
    found: dict[str, None] = {}
    for prefix in corpus.prefixes:
        schema = pa.schema([]) if prefix.sidecar is None else prefix.sidecar.schema_arrow
        for field in schema:
            is_number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
            if is_number and field.name not in (*OWN_COLUMNS, corpus.domain_key):
                found[field.name] = None
    return list(found)


def read_scores(corpus: Corpus, document_K: np.ndarray) -> Scores:
    """Read all score columns of these documents, which are sorted; NaN for one without a score."""
    names = score_columns(corpus)
    values_KC = np.full((len(document_K), len(names)), np.nan)
    for at, table in _rows(corpus, document_K, names):
        for number, name in enumerate(names):
            if name in table.column_names:
                column = table[name].cast(pa.float64(), safe=False).to_numpy()
                # Null is NaN already; no mean or correlation has a place for an infinite one.
                values_KC[at, number] = np.where(np.isfinite(column), column, np.nan)
    return Scores(names=tuple(names), document_K=document_K, values_KC=values_KC)


def text_statistics(texts: DocumentTexts, document_K: np.ndarray, max_documents: int) -> Scores:
    """Compute the statistics of some of these documents, which are sorted, from their texts.

    They are taken at even distances, at most `max_documents`. Empty if no text can be read.
    """
    step = max(1, -(-len(document_K) // max_documents))
    found = [(int(d), texts.of(int(d), TOKENS_OF_TEXT)) for d in document_K[::step]]
    known = [(document, text) for document, text in found if text is not None]
    names = tuple(STATISTICS)
    if not known:
        return Scores(
            names=names, document_K=np.zeros(0, np.int64), values_KC=np.zeros((0, len(names)))
        )
    batch = Texts(TextBatch.of([text for _, text in known]))
    columns = [statistic(batch).astype(np.float64) for statistic in STATISTICS.values()]
    return Scores(
        names=names,
        document_K=np.array([document for document, _ in known], np.int64),
        values_KC=np.stack(columns, axis=1),
    )


def read_sources(corpus: Corpus, document_K: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """Returns the source file and the record of these documents, which are sorted; null where the
    sidecar is missing.
    """
    found: dict[str, list[object]] = {name: [None] * len(document_K) for name in OWN_COLUMNS[:2]}
    for at, table in _rows(corpus, document_K, OWN_COLUMNS[:2]):
        for name, values in found.items():
            if name in table.column_names:
                for number, value in zip(at.tolist(), table[name].to_pylist(), strict=True):
                    values[number] = value
    source, record = found.values()
    return pa.array(source, pa.string()), pa.array(record, pa.int64())


def _rows(
    corpus: Corpus, document_K: np.ndarray, names: Sequence[str]
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Yields numbers of documents in `document_K` with their rows of the sidecars."""
    for prefix in corpus.prefixes:
        yield from _rows_of(prefix, document_K, names)


def _rows_of(
    prefix: Prefix, document_K: np.ndarray, names: Sequence[str]
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    sidecar = prefix.sidecar
    if sidecar is None:
        return
    known = [name for name in names if name in sidecar.schema_arrow.names]

    first = prefix.first_document
    for group in range(sidecar.num_row_groups):
        stop = first + sidecar.metadata.row_group(group).num_rows
        at = np.arange(*np.searchsorted(document_K, [first, stop]))
        if known and len(at):
            rows = sidecar.read_row_group(group, columns=known)
            yield at, rows.take(pa.array(document_K[at] - first))
        first = stop
