"""Domains of documents, read from the metadata sidecar of an indexed file.

The sidecar (files/sidecar_format.py) has one row per document, in the order of the index, and names
the tokenizer that made the data. Only the domain column is read, one row group at a time, into a
small integer per document. Without a sidecar every document has the domain "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dwm.config.errors import UserError
from megatron_dwm.data.prefixes import IndexedFile
from megatron_dwm.data.tokenizer_record import check_record
from megatron_dwm.files.sidecar_columns import UNKNOWN_DOMAIN, read_codes
from megatron_dwm.files.sidecar_format import OWN_COLUMNS, TOKENIZER_SHA256, VOCAB_SIZE, facts_in

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer

_SCANNED_TOKENS = 1 << 24
_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DocumentDomains:
    """The domain of every document of one indexed file."""

    names: tuple[str, ...]
    codes: np.ndarray | None
    """an index into `names` for each document; None if all documents have `names[0]`"""

    def of(self, document: int) -> str:
        """Returns the domain of the document with this number in its file."""
        return self.names[0] if self.codes is None else self.names[self.codes[document]]


def read_domains(file: IndexedFile, domain_key: str) -> DocumentDomains:
    """Read the domains of all documents of `file`; a null or empty value counts as "unknown".

    Raises:
        UserError: the sidecar cannot be read, has another number of rows than the index has
            documents, or has metadata columns but not `domain_key`.
    """
    sidecar = open_sidecar(file)
    if sidecar is None or not _has_domains(sidecar, file, domain_key):
        return DocumentDomains(names=(UNKNOWN_DOMAIN,), codes=None)
    try:
        names, codes = read_codes(sidecar, domain_key)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.sidecar_path} cannot be read ({reason})") from error
    return DocumentDomains(names=names, codes=codes)


def check_sidecar(file: IndexedFile, domain_key: str) -> None:
    """Check the sidecar's row count and columns, from its footer alone.

    Raises:
        UserError: as `read_domains`.
    """
    sidecar = open_sidecar(file)
    if sidecar is not None:
        _has_domains(sidecar, file, domain_key)


def check_tokenizer(file: IndexedFile, tokenizer: Tokenizer) -> None:
    """Check that `file` was made with `tokenizer`.

    The sidecar names the tokenizer; without one, the largest of the first 16 million token ids must
    be below the vocabulary size.

    Raises:
        UserError: another tokenizer, another vocabulary size, other ends of documents or special
            tokens around them, or an id that is too large.
    """
    sidecar = open_sidecar(file)
    recorded = {} if sidecar is None else facts_in(sidecar.schema_arrow)
    recorded_sha256 = recorded.get(TOKENIZER_SHA256, "")
    recorded_size = recorded.get(VOCAB_SIZE, "")
    differs = (recorded_sha256 not in ("", tokenizer.sha256)) or (
        recorded_size not in ("", str(tokenizer.vocab_size))
    )
    if differs:
        raise UserError(
            f"{file.sidecar_path} says that the data was made with tokenizer "
            f"{recorded_sha256[:12] or '(not named)'} of {recorded_size or 'unnamed'} pieces, but "
            f"data.tokenizer {tokenizer.model_path} is {tokenizer.sha256[:12]} of "
            f"{tokenizer.vocab_size} pieces: use the same one"
        )
    check_record(recorded, file.sidecar_path, tokenizer)
    if not recorded_sha256:
        _check_largest_id(file, tokenizer)


def open_sidecar(file: IndexedFile) -> pq.ParquetFile | None:
    """Open the metadata of `file`; None if there is none.

    Raises:
        UserError: it cannot be read, or has another number of rows than there are documents.
    """
    path = file.sidecar_path
    if not path.is_file():
        return None
    try:
        sidecar = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable Parquet file ({reason})") from error
    if sidecar.metadata.num_rows != file.num_documents:
        raise UserError(
            f"{path} has {sidecar.metadata.num_rows} rows but {file.idx_path.name} has "
            f"{file.num_documents} documents: they are not of one run, preprocess again"
        )
    return sidecar


def _has_domains(sidecar: pq.ParquetFile, file: IndexedFile, domain_key: str) -> bool:
    """True if the sidecar has the column; other metadata without it means a misspelled key."""
    columns = sidecar.schema_arrow.names
    if domain_key in columns:
        kind = sidecar.schema_arrow.field(domain_key).type
        if pa.types.is_nested(kind):
            raise UserError(
                f"{file.sidecar_path}: column {domain_key} (data.domain_key) is {kind}: expected "
                "one value for each document"
            )
        return True
    others = [name for name in columns if name not in OWN_COLUMNS]
    if others:
        raise UserError(
            f"{file.sidecar_path} has no column {domain_key} (data.domain_key): "
            f"it has {', '.join(others)}"
        )
    return False


def _check_largest_id(file: IndexedFile, tokenizer: Tokenizer) -> None:
    if file.num_tokens == 0:
        return
    ids = np.memmap(file.bin_path, dtype=file.dtype, mode="r", shape=(file.num_tokens,))
    stop = min(file.num_tokens, _SCANNED_TOKENS)
    largest = max(
        int(ids[start : min(start + _CHUNK_TOKENS, stop)].max())
        for start in range(0, stop, _CHUNK_TOKENS)
    )
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{file.bin_path} holds token id {largest} but data.tokenizer {tokenizer.model_path} "
            f"has {tokenizer.vocab_size} pieces: use the tokenizer that the data was made with"
        )
