"""A digest of everything that a run depends on, so that a resumed run can refuse changes.

Files are compared by a digest of their bytes, of large ones of some of them (files/digest.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_dwm.config import Config
from megatron_dwm.config.blend import parse_blend
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.domains import read_domains
from megatron_dwm.data.prefixes import read_indexed_file
from megatron_dwm.data.values import DocumentValues
from megatron_dwm.files.digest import digest_of_files
from megatron_dwm.model import LlamaShape
from megatron_dwm.tokenizer.huggingface import FILE_NAME
from megatron_dwm.weighting import method_class

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
    digests = {"model": json.dumps(shape.record(), sort_keys=True)}
    for key, paths in _files_by_key(config):
        digests[key] = digest_of_files(paths)
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
    return {digest_of_files(_tokenizer_files(name)) for name in named if name.exists()}


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
