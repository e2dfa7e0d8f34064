"""What `--input` names: files, directories, patterns and data sets of the hub.

A directory stands for all files below it with a known ending, a pattern for the files it matches,
both in the order of their paths as strings. A shard is a number of consecutive files; the shards
have about equal bytes, and one after the other they are the whole, in order.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.read.hub import HUB_PREFIX, split_name
from megatron_dwm.preprocess.read.lines import CHUNK_BYTES, read_lines
from megatron_dwm.preprocess.read.streams import COMPRESSIONS
from megatron_dwm.preprocess.read.tables import TABLE_SUFFIXES, read_table_file
from megatron_dwm.preprocess.records import Chunk, Position

_LINES_SUFFIXES = (".jsonl", ".json", ".ndjson")
KNOWN_FORMATS = (
    ".jsonl, .jsonl.gz, .jsonl.zst, .jsonl.bz2, .jsonl.xz, .parquet, .arrow, a directory of "
    "such files, or hf://DATASET[:split]"
)
# What a run writes, after its --output-prefix: also the shards beside it.
_OWN_FILE = re.compile(
    r"(-\d{5}-of-\d{5})?(\.unfinished/.*|\.preprocess\.json|\.rejects\.jsonl|_.*\.meta\.parquet)"
)


@dataclass(frozen=True, kw_only=True)
class Input:
    """One file or one data set of the hub."""

    name: str
    """its path or hf:// name, as the sidecar has it"""
    size_bytes: int
    modified_ns: int
    """time of the last change; 0 for a data set of the hub"""

    @property
    def is_hub(self) -> bool:
        """True if the `datasets` library reads it."""
        return self.name.startswith(HUB_PREFIX)


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How inputs are read."""

    columns: tuple[str, ...]
    """top-level columns that are read from tables"""
    max_record_bytes: int
    """longest line"""
    chunk_bytes: int = CHUNK_BYTES
    """decompressed bytes of a chunk of lines or rows"""


def find_inputs(names: Sequence[str], output_prefix: str | None = None) -> list[Input]:
    """The inputs that `names` stand for, in reading order.

    output_prefix: of the run, whose own files in a directory or a pattern's reach are no inputs.
    Raises `UserError` for a name without a readable file of a known format, and for a file that is
    named twice: overlapping patterns, or links.
    """
    found = [_look_at(path) for name in names for path in _expand(name, output_prefix)]
    assert found or not names
    _require_different(found)
    return found


def _require_different(inputs: Sequence[Input]) -> None:
    names: dict[str, str] = {}
    for entry in inputs:
        real = entry.name if entry.is_hub else os.path.realpath(entry.name)
        if real in names:
            raise UserError(
                f"{entry.name}: the same input as {names[real]}; its documents would be in the "
                "dataset twice: name it once"
            )
        names[real] = entry.name


def take_shard(inputs: Sequence[Input], shard: int, num_shards: int) -> list[Input]:
    """Cut the files into `num_shards` shards and return the `shard`-th, from 0.

    Every file is in exactly one shard and no shard is without files. Raises `UserError` if there
    are fewer files than shards, or a data set of the hub, whose size is not known.
    """
    if not 0 <= shard < num_shards:
        raise UserError(f"--shard {shard}: expected 0 to {num_shards - 1} (--num-shards - 1)")
    if num_shards > 1 and any(entry.is_hub for entry in inputs):
        raise UserError("--num-shards: an hf:// data set has no sizes; download its files to shard")
    if num_shards > len(inputs):
        raise UserError(
            f"--num-shards {num_shards}: a file is never cut and there are {len(inputs)}; "
            f"take at most {len(inputs)} shards"
        )
    cuts = [_cut(inputs, k, num_shards) for k in (shard, shard + 1)]
    return list(inputs[cuts[0] : cuts[1]])


def _cut(inputs: Sequence[Input], shard: int, num_shards: int) -> int:
    """Index of the first file of `shard`: the first that begins after its part of the bytes."""
    total = sum(entry.size_bytes for entry in inputs)
    index = before = 0
    while index < len(inputs) and before * num_shards < total * shard:
        before += inputs[index].size_bytes
        index += 1
    # Room for at least one file in each shard on either side.
    return max(shard, min(index, len(inputs) - (num_shards - shard)))


def digest_of_inputs(inputs: Sequence[Input]) -> str:
    """The SHA-256 of all inputs' names and sizes, in order, by which they are cut into shards.

    Names are relative to the folder that all of them have in common, which may be mounted at other
    places on other machines.
    """
    paths = [os.path.abspath(entry.name) for entry in inputs]  # noqa: PTH100
    common = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    names = [os.path.relpath(path, common) for path in paths]
    known = json.dumps([(n, e.size_bytes) for n, e in zip(names, inputs, strict=True)])
    return hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()


def read_input(entry: Input, start: Position, settings: ReadSettings) -> Iterator[Chunk]:
    """Chunks of one input from `start` on."""
    path = Path(entry.name)
    if entry.is_hub:
        from megatron_dwm.preprocess.read.hub import read_hub

        return read_hub(
            entry.name, start, columns=settings.columns, chunk_bytes=settings.chunk_bytes
        )
    if path.suffix in TABLE_SUFFIXES:
        return read_table_file(
            path, entry.name, start, columns=settings.columns, chunk_bytes=settings.chunk_bytes
        )
    return read_lines(
        path,
        entry.name,
        start,
        max_record_bytes=settings.max_record_bytes,
        chunk_bytes=settings.chunk_bytes,
    )


def read_inputs(
    inputs: Sequence[Input], start: Position, settings: ReadSettings
) -> Iterator[Chunk]:
    """Chunks of all inputs from `start` on."""
    for index in range(start.input, len(inputs)):
        begin = start if index == start.input else Position(input=index)
        yield from read_input(inputs[index], begin, settings)


def is_known(path: Path) -> bool:
    """True if the file's ending names a format."""
    if path.suffix in COMPRESSIONS:
        return True
    return path.suffix in (*_LINES_SUFFIXES, *TABLE_SUFFIXES)


def _expand(name: str, output_prefix: str | None) -> list[str]:
    if name.startswith(HUB_PREFIX):
        if not split_name(name)[0]:
            raise UserError(f"{name}: expected hf://DATASET[:split]")
        return [name]
    if Path(name).is_dir():
        return _files_below(name, output_prefix)
    if glob.has_magic(name) and not Path(name).exists():
        found = glob.glob(name, recursive=True)  # noqa: PTH207 (keeps the name as it is written)
        files = [match for match in found if Path(match).is_file()]
        matches = [file for file in files if not _is_own(file, output_prefix)]
        if not matches:
            raise UserError(f"{name}: no file matches this pattern")
        return sorted(matches)
    return [name]


def _is_own(path: str, output_prefix: str | None) -> bool:
    """True if the run with this prefix, or a shard of it, writes this file."""
    if output_prefix is None:
        return False
    whole, prefix = os.path.abspath(path), os.path.abspath(output_prefix)  # noqa: PTH100
    rest = whole.removeprefix(prefix)
    return rest != whole and _OWN_FILE.fullmatch(rest) is not None


def _is_read_anyway(path: Path, directory: str) -> bool:
    """True for a link to a folder that is read under its own name, in the directory."""
    if not path.is_symlink():
        return False
    inside = os.path.relpath(path.resolve(), os.path.realpath(directory))
    return not any(part.startswith(".") and part != "." for part in Path(inside).parts)


def _files_below(directory: str, output_prefix: str | None) -> list[str]:
    """Returns the files of known formats in a directory and all below it, links included.

    A link to a folder inside the directory is left out: its files are there under their own names.
    """
    seen: dict[str, str] = {}
    found: list[str] = []
    for folder, inner, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            raise UserError(
                f"{folder}: is {seen[real]} under another name, which would be read twice; remove "
                "the link, or name the directories"
            )
        seen[real] = folder
        inner[:] = [
            name
            for name in inner
            if not name.startswith(".") and not _is_read_anyway(Path(folder, name), directory)
        ]
        visible = (Path(folder, name) for name in files if not name.startswith("."))
        found += [str(path) for path in visible if path.is_file() and is_known(path)]
    found = [path for path in found if not _is_own(path, output_prefix)]
    if not found:
        raise UserError(f"{directory}: no file of a known format in it; expected {KNOWN_FORMATS}")
    return sorted(os.path.join(directory, Path(p).relative_to(directory)) for p in found)  # noqa: PTH118


def _look_at(name: str) -> Input:
    if name.startswith(HUB_PREFIX):
        return Input(name=name, size_bytes=0, modified_ns=0)
    path = Path(name)
    if not path.exists():
        raise UserError(f"{path}: no such input file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: you may not read this file")
    if not is_known(path):
        raise UserError(
            f"{path}: its ending names no known format; expected one of {KNOWN_FORMATS}"
        )
    status = path.stat()
    return Input(name=name, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)
