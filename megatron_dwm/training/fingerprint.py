"""What a run depends on, written down, so that a resumed run can refuse what has changed.

Configuration keys are compared one by one; the files behind them by a digest of their bytes. Of a
file above 16 MiB only 256 blocks of 64 KiB at even distances are read, the first and the last among
them, and the size: a file that was swapped or made anew is noticed, one altered byte may not be.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.paths import PATH_KEYS, is_same_path
from megatron_dwm.config.schema import LEARNING_POLICIES, DataConfig
from megatron_dwm.data.domains import read_domains
from megatron_dwm.data.prefixes import parse_blend, read_indexed_file
from megatron_dwm.model import LlamaShape
from megatron_dwm.tokenizer.huggingface import FILE_NAME

_BLOCK_BYTES = 1 << 16
_NUM_BLOCKS = 256

TOKENIZER_KEY = "data.tokenizer"
DOMAINS = "data.train (domains in .meta.parquet)"
"""the mark of every document's domain; checkpoints of earlier versions lack it"""
_ALLOWED_BY = {DOMAINS: ("data.train", "data.domain_key")}

# Keys that a resumed run may change; everything else decides what is trained.
MAY_CHANGE = {
    "run.dir",
    "run.resume",
    "run.allow_changed",
    "training.learning_rate",
    "training.min_learning_rate_fraction",
    "training.checkpoint_interval_steps",
    "training.checkpoint_async",
    "training.keep_last",
    "training.keep_every",
    "training.max_skipped_steps",
    "training.spike_factor",
    "training.log_interval_steps",
    "training.steps",
    "training.micro_batch_size",
    "data.cache_dir",
    "model.recompute",
    "weighting.learning_rate",
}
# What a run starts from: once it has a checkpoint, that has all of it.
_STARTS_FROM = ("model.init_from", "weighting.load")
MAY_CHANGE_SECTIONS = ("parallel", "logging", "evaluation", "profiling")


def fingerprint(config: Config, shape: LlamaShape) -> dict[str, str]:
    """What the run's results depend on besides its configuration, by the key that names it."""
    marks = {"model": json.dumps(dataclasses.asdict(shape), sort_keys=True)}
    for key, paths in _files_by_key(config):
        marks[key] = _digest(paths)
    marks[DOMAINS] = _digest_of_domains(config.data)
    return marks


def refuse_changes(
    old: Config, new: Config, where: Path, typed: Mapping[str, Any] | None = None
) -> None:
    """Raise UserError for the first key that a resumed run changes and may not.

    typed: how the paths of the old configuration were typed.
    """
    before, now = _flat(old), _flat(new)
    _require_known(new.run.allow_changed, [*now, "model"])
    changed = [
        key
        for key in now
        if before[key] != now[key]
        and not _may_change(key, new)
        and not (key in PATH_KEYS and is_same_path(key, before[key], now[key], typed or {}))
    ]
    if changed:
        key, others = changed[0], ", ".join(changed[1:])
        raise UserError(
            f"{key}: the run in {where} has {before[key]!r}, now {now[key]!r}; a resumed run "
            f"must keep it; choose another run.dir, or allow it with {_allow(key)}"
            f"{f' (also changed: {others})' if others else ''}"
        )


def without_effect(old: Config, new: Config) -> list[str]:
    """Changed keys of a resumed run that its checkpoint overrules."""
    before, now = _flat(old), _flat(new)
    if old.policy.name != new.policy.name:  # the new one's weighting model has no state yet
        before["weighting.load"] = now["weighting.load"]
    return [key for key in _STARTS_FROM if not is_same_path(key, before[key], now[key], {})]


def _require_known(allowed: Iterable[str], known: list[str]) -> None:
    for key in allowed:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"run.allow_changed {key}: no such key; the nearest is {nearest}")


def refuse_changed_files(old: dict[str, str], new: dict[str, str], config: Config) -> None:
    """Raise UserError for the first key behind which something else lies than when it was saved.

    What only one of the two reads, since the policy may change by name, is nothing to compare.
    """
    for key in sorted(old.keys() & new.keys()):
        before, now = old[key], new[key]
        keys = _ALLOWED_BY.get(key, (key,))
        if before != now and not set(keys) & set(config.run.allow_changed):
            allow = _allow(keys[0])
            remedy = f"or allow it with {allow}" if "." in key else "or choose another run"
            raise UserError(
                f"{key}: the content has changed since the checkpoint: it was {before}, now "
                f"{now}; a resumed run must keep it; put it back, {remedy}"
            )


def _may_change(key: str, config: Config) -> bool:
    if key in config.run.allow_changed:
        return True
    if key == "training.micro_batch_size" and config.policy.name in LEARNING_POLICIES:
        # Weights are normalised over the group: another one is another method.
        return config.weighting.group != "micro_batch"
    return key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE_SECTIONS


def _allow(key: str) -> str:
    return f"--run.allow_changed {key}"


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in dataclasses.asdict(config).items()
        for key, value in values.items()
    }


def _files_by_key(config: Config) -> Iterator[tuple[str, list[Path]]]:
    prefixes = [part.prefix for part in parse_blend(config.data.train)]
    yield "data.train", [Path(f"{prefix}.{end}") for prefix in prefixes for end in ("bin", "idx")]
    if config.data.tokenizer is not None:
        yield TOKENIZER_KEY, _tokenizer_files(Path(config.data.tokenizer))
    if config.validation.path is not None and (
        config.learns or config.policy.name == "validation_mixing"
    ):
        yield "validation.path", [Path(config.validation.path)]


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
