"""Whether the documents of a dataset have special tokens around their text, as Llama 3's beginning.

Our sidecar says so. Megatron-LM writes none, and puts the tokens of tokenizer.json's post-processor
around a text unless it is told not to, so the first documents of its datasets are looked at.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dwm.config.blend import parse_blend
from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.prefixes import read_indexed_file
from megatron_dwm.files.dataset_paths import DatasetPaths
from megatron_dwm.files.sidecar_format import read_facts, special_tokens, spell_ids
from megatron_dwm.runtime.warn import print_warning
from megatron_dwm.tokenizer import JSON_KINDS, SpecialTokens, kind_of, open_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

_DOCUMENTS = 1000
"""the documents of a dataset that are looked at, from its first one on"""
_MOST = 0.5


def has_special_tokens(data: DataConfig, kept: bool | None = None) -> bool:
    """True if the documents of `data.train` have the special tokens of `data.tokenizer`.

    Prints a warning if some have them and others do not. Raises UserError for a malformed list;
    `check_data` reports problems with the files.

    kept: what a run that is resumed took datasets without a sidecar for.
    """
    prefixes = [part.prefix for part in parse_blend(data.train)]
    plain = [prefix for prefix in prefixes if not _sidecar(prefix).exists()]
    recorded = any(any(_recorded(prefix)) for prefix in prefixes if prefix not in plain)
    if not plain:
        return recorded
    if kept is not None:
        return recorded or kept
    tokens = _possible(data)
    if tokens is None:
        return recorded
    shares = {prefix: share for prefix in plain if (share := _share(prefix, tokens)) is not None}
    found = recorded or any(share > _MOST for share in shares.values())
    for prefix, share in shares.items():
        if share != found:
            ids = spell_ids(tokens.before or tokens.after)
            print_warning(
                f"{prefix}: {share:.0%} of its first {_DOCUMENTS} documents have the special "
                f"tokens [{ids}] of data.tokenizer; the target and held-out text are encoded "
                f"{'with' if found else 'without'} them"
            )
    return found


def _sidecar(prefix: str) -> Path:
    return DatasetPaths.of(prefix).sidecar


def _recorded(prefix: str) -> tuple[str, str]:
    """Returns the ids that a sidecar records; an older one, or a damaged one, has none."""
    with suppress(ValueError, OSError):
        return special_tokens(read_facts(_sidecar(prefix)))
    return "", ""


def _share(prefix: str, tokens: SpecialTokens) -> float | None:
    """Returns the part of the first documents that have the tokens; None without documents."""
    try:
        read_indexed_file(prefix)
    except UserError:
        return None
    found = [_has(tokens, ids) for ids in _documents(prefix)]
    return sum(found) / len(found) if found else None


def _possible(data: DataConfig) -> SpecialTokens | None:
    """Returns what the tokenizer would put around a text; None if nothing, or not around it.

    An end after the text alone looks like the end of a document, so it is taken for that.
    """
    with suppress(UserError):
        if data.tokenizer is None or kind_of(data.tokenizer) not in JSON_KINDS:
            return None
        tokenizer = open_tokenizer(data.tokenizer, include_special_tokens=True)
        around = tokenizer.around
        is_end = not around.before and tuple(around.after) == (tokenizer.eod_id,)
        return around if (around.before or around.after) and not is_end else None
    return None


def _documents(prefix: str) -> Iterator[np.ndarray]:
    """Yields the ids of the first documents that are not empty."""
    indexed = IndexedDataset(prefix, mmap=True)
    borders = indexed.document_indices[: _DOCUMENTS + 1]
    for start, stop in zip(borders[:-1], borders[1:], strict=True):
        if start < stop:
            yield np.concatenate([indexed[number] for number in range(start, stop)])


def _has(tokens: SpecialTokens, ids: np.ndarray) -> bool:
    """Returns whether a document has the tokens before its text, or, if there are none, after it.

    The last id may be the end of the document.
    """
    if tokens.before:
        return ids[: len(tokens.before)].tolist() == list(tokens.before)
    size, last = len(tokens.after), len(ids)
    wanted = list(tokens.after)
    return wanted in (ids[last - size :].tolist(), ids[max(last - size - 1, 0) : -1].tolist())
