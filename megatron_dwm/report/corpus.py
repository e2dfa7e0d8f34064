"""The training data of a run, as far as it is still where config.yaml says.

Documents are numbered over all prefixes of `data.train`, each once, in their order. What is missing
or changed becomes a note, and the documents of the other prefixes can still be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dwm.config.blend import parse_blend
from megatron_dwm.config.errors import UserError
from megatron_dwm.files.dataset_paths import DatasetPaths
from megatron_dwm.files.index_format import IndexHeader, end_of_tokens_bytes, read_header
from megatron_dwm.report.runs import Run


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """One prefix of the training data.

    header: of its tokens; None if they cannot be read. sidecar: None if there is none.
    """

    paths: DatasetPaths
    first_document: int
    num_documents: int
    header: IndexHeader | None
    sidecar: pq.ParquetFile | None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The prefixes whose documents can be told, in order, the tokenizer, and what is missing.

    domain_key: the sidecar's column with the domain. notes: a line for everything that is missing.
    """

    prefixes: Sequence[Prefix]
    tokenizer: str | None
    domain_key: str
    notes: Sequence[str]

    @staticmethod
    def open(run: Run) -> Corpus:
        """Find the data of a run."""
        notes: list[str] = []
        try:
            names = [part.prefix for part in parse_blend(run.key("data", "train") or [])]
        except UserError as error:
            names, notes = [], [f"no text of documents: {error}"]
        prefixes, first = [], 0
        for name in names:
            found = _prefix(name, first, notes)
            if found is None:
                if name != names[-1]:
                    notes.append("documents of the prefixes after it cannot be numbered")
                break
            prefixes.append(found)
            first += found.num_documents
        return Corpus(
            prefixes=prefixes,
            tokenizer=run.key("data", "tokenizer"),
            domain_key=str(run.key("data", "domain_key")),
            notes=notes,
        )

    def locate(self, document: int) -> tuple[Prefix, int] | None:
        """Returns a document's prefix and its number there; None if it is in none of them."""
        for prefix in self.prefixes:
            number = document - prefix.first_document
            if 0 <= number < prefix.num_documents:
                return prefix, number
        return None


def tokens_in_batch(run: Run) -> int | None:
    """Returns the tokens of a global batch; None if the configuration does not have them, or if a
    unit's share of the batch is not that of its tokens (`weighting.unit_share equal`).
    """
    if run.key("weighting", "unit") == "document" and run.key("weighting", "unit_share") == "equal":
        return None
    rows, length = run.key("training", "global_batch_size"), run.key("data", "sequence_length")
    if not isinstance(rows, int) or not isinstance(length, int):
        return None
    return rows * length or None


def _prefix(name: str, first: int, notes: list[str]) -> Prefix | None:
    """Open a prefix; None, and a note, if not even its number of documents is known."""
    paths = DatasetPaths.of(name)
    header, sidecar = _header(paths, notes), _sidecar(paths, notes)
    if header is not None:
        count = header.num_documents
        if sidecar is not None and sidecar.metadata.num_rows != count:
            rows = sidecar.metadata.num_rows
            notes.append(
                f"{paths.sidecar} has {rows} rows for {count} documents: it is not of these data, "
                "and is left out"
            )
            sidecar = None
    elif sidecar is not None:
        count = sidecar.metadata.num_rows
    else:
        return None
    return Prefix(
        paths=paths, first_document=first, num_documents=count, header=header, sidecar=sidecar
    )


def _header(paths: DatasetPaths, notes: list[str]) -> IndexHeader | None:
    try:
        header = read_header(paths.idx)
        if paths.bin.stat().st_size >= end_of_tokens_bytes(paths.idx, header):
            return header
        notes.append(f"{paths.bin} is shorter than its index says; no text of its documents")
    except OSError as error:
        where = error.filename or paths.idx
        notes.append(
            f"{where} cannot be read ({error.strerror}): the data have moved, so their documents "
            "have numbers instead of text"
        )
    except ValueError as error:
        notes.append(str(error))
    return None


def _sidecar(paths: DatasetPaths, notes: list[str]) -> pq.ParquetFile | None:
    if not paths.sidecar.exists():
        notes.append(f"{paths.sidecar} is missing: its documents have no source and no scores")
        return None
    try:
        return pq.ParquetFile(paths.sidecar)
    except (pa.ArrowException, OSError) as error:
        notes.append(f"{paths.sidecar} cannot be read ({str(error).splitlines()[0]})")
        return None
