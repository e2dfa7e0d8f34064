"""What a run depends on besides its configuration, so that a resumed run can refuse what changed.

Files are compared by a digest of their bytes. Of a file above 16 MiB only 256 blocks of 64
KiB at even distances are read, the first and the last among them, and the size: a file that was
swapped or made anew is noticed, one altered byte may not be.
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
from megatron_dwm.model import LlamaShape
from megatron_dwm.tokenizer.huggingface import FILE_NAME
from megatron_dwm.weighting import method_class

_BLOCK_BYTES = 1 << 16
_NUM_BLOCKS = 256

TOKENIZER_KEY = "data.tokenizer"
DOMAINS = "data.train (domains in .meta.parquet)"
"""the mark of every document's domain; checkpoints of earlier versions lack it"""


def fingerprint(config: Config, shape: LlamaShape) -> dict[str, str]:
    """What the run's results depend on besides its configuration, by the key that names it."""
    marks = {"model": json.dumps(dataclasses.asdict(shape), sort_keys=True)}
    for key, paths in _files_by_key(config):
        marks[key] = _digest(paths)
    marks[DOMAINS] = _digest_of_domains(config.data)
    return marks


def _files_by_key(config: Config) -> Iterator[tuple[str, list[Path]]]:
    prefixes = [part.prefix for part in parse_blend(config.data.train)]
    yield "data.train", [Path(f"{prefix}.{end}") for prefix in prefixes for end in ("bin", "idx")]
    if config.data.tokenizer is not None:
        yield TOKENIZER_KEY, _tokenizer_files(Path(config.data.tokenizer))
    for key, path in method_class(config).depends_on(config):
        yield key, [path]


def tokenizer_digests(path: Path) -> set[str]:
    """What a fingerprint can have under `TOKENIZER_KEY` for a run with the tokenizer at `path`.

    A tokenizer.json may have been named itself or by its directory.
    """
    named = [path, path / FILE_NAME] if path.is_dir() else [path]
    if path.name == FILE_NAME:
        named.append(path.parent)
    return {_digest(_tokenizer_files(place)) for place in named if place.exists()}


def _tokenizer_files(path: Path) -> list[Path]:
    """The file, or the files of a directory that say how text becomes ids."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.name.startswith("tokenizer"))


def _digest_of_domains(data: DataConfig) -> str:
    """A few hexadecimal digits of every document's domain, and the number of documents."""
    digest, total = hashlib.sha256(), 0
    for part in parse_blend(data.train):
        file = read_indexed_file(part.prefix)
        domains = read_domains(file, data.domain_key)
        total += file.num_documents
        digest.update(json.dumps([file.num_documents, domains.names]).encode())
        if domains.codes is not None and len(domains.names) > 1:
            digest.update(domains.codes.tobytes())
    return f"{digest.hexdigest()[:16]} ({total} documents)"


def _digest(paths: Iterable[Path]) -> str:
    """A few hexadecimal digits and the number of bytes."""
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
    """Where blocks begin: everywhere in a small file, at even distances in a large one."""
    if size_bytes <= _BLOCK_BYTES * _NUM_BLOCKS:
        return range(0, size_bytes, _BLOCK_BYTES)
    last = size_bytes - _BLOCK_BYTES
    return [last * number // (_NUM_BLOCKS - 1) for number in range(_NUM_BLOCKS)]
