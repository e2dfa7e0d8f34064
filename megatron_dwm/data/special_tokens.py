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
from megatron_dwm.tokenizer import JSON_KINDS, SpecialTokens, kind_of, open_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

_DOCUMENTS = 1000
"""the documents of a dataset that are looked at, from its first one on"""


def has_special_tokens(data: DataConfig) -> bool:
    """True if the documents of `data.train` have the special tokens of `data.tokenizer`.

    Raises:
        UserError: a malformed list; some documents have them and others do not. `check_data`
            reports problems with the files.
    """
    prefixes = [part.prefix for part in parse_blend(data.train)]
    recorded = [any(_recorded(prefix)) for prefix in prefixes if _sidecar(prefix).exists()]
    seen = {prefix: _seen(prefix, data) for prefix in prefixes if not _sidecar(prefix).exists()}
    answers = {*recorded, *(found for found in seen.values() if found is not None)}
    if len(answers) > 1 and seen:
        have = ", ".join(prefix for prefix, found in seen.items() if found) or "none"
        raise UserError(
            f"data.train: of its datasets without a sidecar these have special tokens around their "
            f"documents: {have}; the others, or those with a sidecar, differ; preprocess all alike"
        )
    return True in answers


def _sidecar(prefix: str) -> Path:
    return DatasetPaths.of(prefix).sidecar


def _recorded(prefix: str) -> tuple[str, str]:
    """Returns the ids that a sidecar records; an older one, or a damaged one, has none."""
    with suppress(ValueError, OSError):
        return special_tokens(read_facts(_sidecar(prefix)))
    return "", ""


def _seen(prefix: str, data: DataConfig) -> bool | None:
    """Returns whether the first documents have the tokens; None if that cannot be known."""
    tokens = _possible(data)
    if tokens is None:
        return None
    try:
        read_indexed_file(prefix)
    except UserError:
        return None
    found = [_has(tokens, ids) for ids in _documents(prefix)]
    if not found:
        return None
    if any(found) and not all(found):
        ids = spell_ids(tokens.before or tokens.after)
        raise UserError(
            f"{prefix}: {sum(found)} of its first {len(found)} documents have the special tokens "
            f"[{ids}] of data.tokenizer {data.tokenizer}, the others do not; preprocess all alike"
        )
    return all(found)


def _possible(data: DataConfig) -> SpecialTokens | None:
    """Returns what the tokenizer would put around a text; None if nothing, or not around it."""
    with suppress(UserError):
        if data.tokenizer is None or kind_of(data.tokenizer) not in JSON_KINDS:
            return None
        tokens = open_tokenizer(data.tokenizer, include_special_tokens=True).around
        return tokens if tokens.before or tokens.after else None
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
