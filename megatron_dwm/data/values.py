"""A number for every document of the training data: a column of its metadata, or one a domain.

A method declares them (weighting/method.py, `document_values`) and finds them in `Batch.values_U`:
a document's own, and of a row the mean over its tokens. Every rank reads them once, when the run
starts, one row group at a time. Memory: 4 bytes a document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_dwm.config.blend import parse_blend
from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.document_counts import document_lengths
from megatron_dwm.data.domains import open_sidecar, read_domains
from megatron_dwm.data.prefixes import IndexedFile, read_indexed_file
from megatron_dwm.files.command_names import name_of_command


@dataclass(frozen=True, kw_only=True)
class DocumentValues:
    """The values of all documents.

    of_prefixes: float32, one a document, for every prefix in the order of `data.train`.
    are_of_a_column: they depend on a column of the metadata that nothing else reads.
    """

    of_prefixes: tuple[np.ndarray, ...]
    are_of_a_column: bool = False


def column_values(
    data: DataConfig, key: str, column: str, *, may_be_negative: bool
) -> DocumentValues:
    """Read a numeric column of the metadata of every prefix. Booleans are 0 and 1.

    key: the configuration key that names the column.

    Raises:
        UserError: there is no metadata or no such column, or a document has no finite number.
    """
    found = [
        _read(file, f"{key} {column}", column, -np.inf if may_be_negative else 0.0)
        for file in _files(data)
    ]
    return DocumentValues(of_prefixes=tuple(found), are_of_a_column=True)


def token_values(data: DataConfig) -> DocumentValues:
    """Returns the length of every document in tokens, its end included."""
    lengths = [document_lengths(file).astype(np.float32) for file in _files(data)]
    return DocumentValues(of_prefixes=tuple(lengths))


def domain_values(data: DataConfig, key: str, weights: Mapping[str, float]) -> DocumentValues:
    """Returns the value of every document's domain; 1 for a domain that `weights` does not name.

    key: the configuration key that gives the weights.

    Raises:
        UserError: no document is of a domain that `weights` names.
    """
    files = _files(data)
    weights = {str(name): weight for name, weight in weights.items()}  # YAML reads 1 as a number
    domains = [read_domains(file, data.domain_key) for file in files]
    known = sorted({name for of_file in domains for name in of_file.names})
    for name in weights:
        if name not in known:
            raise UserError(
                f"{key} {name}: no document of data.train is of this domain (data.domain_key "
                f"{data.domain_key}): there are {', '.join(known)}"
            )
    found = []
    for file, of_file in zip(files, domains, strict=True):
        of_names = np.array([weights.get(name, 1.0) for name in of_file.names], dtype=np.float32)
        codes = np.zeros(file.num_documents, int) if of_file.codes is None else of_file.codes
        found.append(of_names[codes])
    return DocumentValues(of_prefixes=tuple(found))


def _files(data: DataConfig) -> list[IndexedFile]:
    return [read_indexed_file(part.prefix) for part in parse_blend(data.train)]


def _read(file: IndexedFile, named: str, column: str, smallest: float) -> np.ndarray:
    sidecar = open_sidecar(file)
    if sidecar is None:
        raise UserError(
            f"{named}: there is no {file.sidecar_path} with the documents' metadata; "
            f"{name_of_command('preprocess')} writes it"
        )
    _check_type(sidecar, file, named, column)
    values = np.empty(file.num_documents, dtype=np.float32)
    row = 0
    for group in range(sidecar.num_row_groups):
        try:
            read = sidecar.read_row_group(group, columns=[column])
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{named}: {file.sidecar_path} cannot be read ({reason})") from error
        of_group = pc.cast(read.column(0), pa.float64(), safe=False).to_numpy()
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused
            found = of_group.astype(np.float32)
        wrong = ~(np.isfinite(found) & (of_group >= smallest))
        if wrong.any():
            first = int(np.argmax(wrong))
            sign = "" if smallest < 0 else ", 0 or more"
            raise UserError(
                f"{named}: document {row + first} of {file.sidecar_path} (counted from 0) has "
                f"{_spelled(read.column(0)[first])}: expected a finite number{sign}"
            )
        values[row : row + len(found)] = found
        row += len(found)
    return values


def _check_type(sidecar: pq.ParquetFile, file: IndexedFile, named: str, column: str) -> None:
    names = sidecar.schema_arrow.names
    if column not in names:
        raise UserError(
            f"{named}: {file.sidecar_path} has no such column: it has {', '.join(names)}"
        )
    kind = sidecar.schema_arrow.field(column).type
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    if not any(check(kind) for check in (*checks, pa.types.is_null)):
        raise UserError(f"{named}: in {file.sidecar_path} it is {kind}, expected numbers")


def _spelled(value: pa.Scalar) -> str:
    return str(value.as_py()) if value.is_valid else "null"
