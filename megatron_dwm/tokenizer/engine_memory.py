"""What the trial of the fast engine said of a tokenizer, remembered from run to run.

`$XDG_CACHE_HOME/megatron_dwm/engines/KEY` (else under `~/.cache`), one file a tokenizer; KEY is a
digest of the tokenizer's content and of the versions of the trial and of the libraries that took
part. The file is a line of JSON and the definition that gigatoken loads, whose digest the line
holds: a damaged file is none. The directory may be removed at any time; where it cannot be read or
written, every run tries anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_dwm.tokenizer.interface import Tokenizer

_TRIAL = 2
"""to be raised whenever the trial or what gigatoken is given changes"""
_LIBRARIES = ("gigatoken", "sentencepiece", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether gigatoken may encode in place of a tokenizer."""

    why_not: str | None
    """None if it may"""
    definition: str
    """what gigatoken loads; empty if it may not"""


def recall(tokenizer: Tokenizer) -> Verdict | None:
    """The verdict of an earlier trial; None if there is none that can be trusted."""
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
    """Keep `verdict`, at once or not at all; nothing happens where that is impossible."""
    definition = verdict.definition.encode("utf-8")
    digest = hashlib.sha256(definition).hexdigest()
    head = json.dumps({"why_not": verdict.why_not, "sha256": digest}).encode()
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(tokenizer)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(head + b"\n" + definition)
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


def _path(tokenizer: Tokenizer) -> Path:
    asked = os.environ.get("XDG_CACHE_HOME")
    caches = Path(asked) if asked else Path.home() / ".cache"
    marks = [
        _TRIAL,
        *map(_version, _LIBRARIES),
        tokenizer.kind,
        tokenizer.eod_id,
        hashlib.sha256(tokenizer.content).hexdigest(),
    ]
    key = hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]
    return caches / "megatron_dwm" / "engines" / key


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"
