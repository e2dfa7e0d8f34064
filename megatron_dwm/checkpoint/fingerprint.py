"""A digest of everything that a run depends on, so that a resumed run can refuse changes.

Files are compared by a digest of their bytes. Of a file above 16 MiB only the size and 256 blocks
of 64 KiB are read, evenly spaced from the first to the last. A replaced file is noticed; a single
changed byte may not be.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_dwm.config import Config
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.domains import read_domains
from megatron_dwm.data.prefixes import parse_blend, read_indexed_file
from megatron_dwm.data.values import DocumentValues
from megatron_dwm.model import LlamaShape
from megatron_dwm.tokenizer.huggingface import FILE_NAME
from megatron_dwm.weighting import method_class

_BLOCK_BYTES = 1 << 16
_NUM_BLOCKS = 256

TOKENIZER_KEY = "data.tokenizer"
DOMAINS = "data.train (domains in .meta.parquet)"
"""key for the domains of all documents; checkpoints of earlier versions lack it"""
VALUES = "data.train (values in .meta.parquet)"
"""key for the values of all documents, if the method reads a column of them"""


def fingerprint(
    config: Config, shape: LlamaShape, values: DocumentValues | None = None
) -> dict[str, str]:
    """Returns digests of the model's shape, the data files, the domains and values, by key.

    values: those that the method reads; None if it reads none.
    """
    digests = {"model": json.dumps(dataclasses.asdict(shape), sort_keys=True)}
    for key, paths in _files_by_key(config):
        digests[key] = _digest(paths)
    digests[DOMAINS] = _digest_of_domains(config.data)
    if values is not None and values.are_of_a_column:
        digests[VALUES] = _digest_of_values(values)
    return digests


def _files_by_key(config: Config) -> Iterator[tuple[str, list[Path]]]:
    prefixes = [part.prefix for part in parse_blend(config.data.train)]
    yield "data.train", [Path(f"{prefix}.{end}") for prefix in prefixes for end in ("bin", "idx")]
    if config.data.tokenizer is not None:
        yield TOKENIZER_KEY, _tokenizer_files(Path(config.data.tokenizer))
    of_method: dict[str, list[Path]] = {}
    for key, path in method_class(config).depends_on(config):
        of_method.setdefault(key, []).append(path)
    yield from of_method.items()


def tokenizer_digests(path: Path) -> set[str]:
    """Returns the possible digests under `TOKENIZER_KEY` of a run with the tokenizer at `path`.

    There may be several, since a run can name a tokenizer.json or its directory.
    """
    named = [path, path / FILE_NAME] if path.is_dir() else [path]
    if path.name == FILE_NAME:
        named.append(path.parent)
    return {_digest(_tokenizer_files(name)) for name in named if name.exists()}


def _tokenizer_files(path: Path) -> list[Path]:
    """Returns the file itself, or the tokenizer's files in a directory."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.name.startswith("tokenizer"))


def _digest_of_domains(data: DataConfig) -> str:
    """Returns a short digest of every document's domain, and the number of documents."""
    digest, total = hashlib.sha256(), 0
    for part in parse_blend(data.train):
        file = read_indexed_file(part.prefix)
        domains = read_domains(file, data.domain_key)
        total += file.num_documents
        digest.update(json.dumps([file.num_documents, domains.names]).encode())
        if domains.codes is not None and len(domains.names) > 1:
            digest.update(domains.codes.tobytes())
    return f"{digest.hexdigest()[:16]} ({total} documents)"


def _digest_of_values(values: DocumentValues) -> str:
    """Returns a short digest of every document's value, and the number of documents."""
    digest = hashlib.sha256()
    for values_D in values.of_prefixes:
        digest.update(values_D.tobytes())
    return f"{digest.hexdigest()[:16]} ({sum(map(len, values.of_prefixes))} documents)"


def _digest(paths: Iterable[Path]) -> str:
    """Returns a short digest of the files, and their number of bytes."""
    digest, total_bytes = hashlib.sha256(), 0
    for path in paths:
        size_bytes = path.stat().st_size
        total_bytes += size_bytes
        digest.update(size_bytes.to_bytes(8, "big"))
        with path.open("rb") as stream:
            for start in _starts(size_bytes):
                stream.seek(start)
                digest.update(stream.read(_BLOCK_BYTES))
    return f"{digest.hexdigest()[:16]} ({total_bytes} bytes)"


def _starts(size_bytes: int) -> Iterable[int]:
    """Returns the offsets of the blocks to read: all in a small file, some in a large one."""
    if size_bytes <= _BLOCK_BYTES * _NUM_BLOCKS:
        return range(0, size_bytes, _BLOCK_BYTES)
    last = size_bytes - _BLOCK_BYTES
    return [last * number // (_NUM_BLOCKS - 1) for number in range(_NUM_BLOCKS)]
