"""Remembers the result of the fast engine's trial for a tokenizer from run to run.

The files are `$XDG_CACHE_HOME/megatron_dwm/engines/KEY` (else under `~/.cache`), one for each
tokenizer. KEY is a digest of the tokenizer's content and of the versions of the trial and of its
libraries. A file is a line of JSON and the definition that gigatoken loads. The line has a digest
of the definition, so a damaged file is ignored. The directory may be removed at any time; if it
cannot be read or written, every run repeats the trial.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_dwm.files.atomic import write_bytes
from megatron_dwm.tokenizer.interface import Tokenizer

_TRIAL = 2
"""version of the trial and of the definition that gigatoken gets; increase it with any change"""
_LIBRARIES = ("gigatoken", "sentencepiece", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a trial: may gigatoken encode in place of a tokenizer?"""

    why_not: str | None
    """the reason against it; None if it may"""
    definition: str
    """the vocabulary that gigatoken loads; empty if it may not encode"""


def recall(tokenizer: Tokenizer) -> Verdict | None:
    """Returns the verdict of an earlier trial; None without an intact one."""
    try:
        head, _, definition = _path(tokenizer).read_bytes().partition(b"\n")
        content = json.loads(head)
        if content["sha256"] != hashlib.sha256(definition).hexdigest():
            return None
        why_not = content["why_not"]
        if why_not is not None and not isinstance(why_not, str):
            return None
        return Verdict(why_not=why_not, definition=definition.decode("utf-8"))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: no home
        return None


def remember(tokenizer: Tokenizer, verdict: Verdict) -> None:
    """Store `verdict` atomically; does nothing if the cache cannot be written."""
    definition = verdict.definition.encode("utf-8")
    digest = hashlib.sha256(definition).hexdigest()
    head = json.dumps({"why_not": verdict.why_not, "sha256": digest}).encode()
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(tokenizer)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, head + b"\n" + definition, shared=True)


def _path(tokenizer: Tokenizer) -> Path:
    asked = os.environ.get("XDG_CACHE_HOME")
    caches = Path(asked) if asked else Path.home() / ".cache"
    properties = [
        _TRIAL,
        *map(_version, _LIBRARIES),
        tokenizer.kind,
        tokenizer.eod_id,
        hashlib.sha256(tokenizer.content).hexdigest(),
    ]
    key = hashlib.sha256(json.dumps(properties).encode()).hexdigest()[:32]
    return caches / "megatron_dwm" / "engines" / key


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"
