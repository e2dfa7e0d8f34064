"""The files other than parameters of a Hugging Face model that training started from.

Every checkpoint keeps them (checkpoint/kept_files.py): configuration, generation settings,
tokenizer, chat templates, license. An export copies them byte for byte. In config.json it rewrites
only what training changed, and it returns a line for each change, for the model card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.checkpoint.kept_files import (
    SETTINGS_FILES,
    TOKENIZER_FILES,
    own_tokenizer,
)
from megatron_dwm.config import UserError
from megatron_dwm.config.huggingface import (
    CONFIG_NAME,
    attention_window,
    check_huggingface_config,
    read_json_object,
)
from megatron_dwm.convert.huggingface import SPECIAL_TOKENS
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.on_disk.huggingface_files import shape_of
from megatron_dwm.tokenizer import open_tokenizer

_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True, kw_only=True)
class CopiedFiles:
    """What an export took from the original model.

    context_tokens: the longest sequence, as config.json of the export says.
    changes: what differs from the original files, one line each.
    """

    context_tokens: int
    changes: tuple[str, ...]


def copy_original_files(
    original: Path,
    directory: Path,
    *,
    shape: LlamaShape,
    dtype: torch.dtype,
    trained_tokens: int,
    special_tokens: dict[str, Any] | None,
) -> CopiedFiles:
    """Copy the original files that a checkpoint keeps into an export.

    Args:
        original: the checkpoint's folder of original files.
        directory: the export.
        shape: shape of the checkpoint's model; config.json has to describe the same.
        dtype: data type of the export's parameters.
        trained_tokens: tokens in a training sequence; 0 for a model that was not trained here.
        special_tokens: ids of the tokenizer that the model was trained with, if that is not the
            original one, whose files are then left out. None for the original tokenizer.

    Raises `UserError` if config.json describes another model.
    """
    config = read_json_object(original / CONFIG_NAME)
    described = check_huggingface_config(config, original / CONFIG_NAME)
    if shape_of(described) != shape:
        raise UserError(
            f"{original / CONFIG_NAME} describes another model than shape.json of the checkpoint; "
            "the checkpoint is damaged, take another one"
        )
    for path in sorted(original.rglob("*")):
        name = path.relative_to(original)
        is_tokenizer = any(name.match(pattern) for pattern in TOKENIZER_FILES)
        if path.is_file() and not (is_tokenizer and special_tokens is not None):
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, directory / name)
    changed, changes = _changes(config, described.context_tokens, dtype, trained_tokens)
    window = attention_window(config, original / CONFIG_NAME)
    if window is not None and window < trained_tokens:  # at least as long as the former context
        changed |= {"sliding_window": None}
        changes.append(f"no sliding window; the original has {window:,} tokens, its whole context")
    _write_changed({**changed, **(special_tokens or {})}, directory / CONFIG_NAME)
    _write_changed(special_tokens or {}, directory / SETTINGS_FILES[1])
    return CopiedFiles(
        context_tokens=max(described.context_tokens, trained_tokens), changes=tuple(changes)
    )


def _changes(
    config: dict[str, Any], context_tokens: int, dtype: torch.dtype, trained_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """Returns the keys of config.json that change, with their new values, and a line for each."""
    changed: dict[str, Any] = {}
    changes = []
    now = str(dtype).removeprefix("torch.")
    named = [key for key in _DTYPE_KEYS if config.get(key) is not None]
    before = config[named[0]] if named else "float32"
    if any(config[key] != now for key in named) or before != now:
        changed |= dict.fromkeys(named or _DTYPE_KEYS[1:], now)
        changes.append(f"parameters are kept in {now}; the original has {before}")
    if trained_tokens > context_tokens:
        changed["max_position_embeddings"] = trained_tokens
        changes.append(
            f"the context is {trained_tokens:,} tokens, as long as the training sequences; the "
            f"original has {context_tokens:,}"
        )
    elif 0 < trained_tokens < context_tokens:
        changes.append(
            f"training sequences have {trained_tokens:,} tokens; the context of "
            f"{context_tokens:,} tokens is the original one"
        )
    return changed, changes


def _write_changed(values: dict[str, Any], path: Path) -> None:
    """Set keys of a JSON file; with no keys the file is left as it is, byte for byte."""
    if values and path.is_file():
        content = {**read_json_object(path), **values}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def special_tokens(original: Path) -> dict[str, Any]:
    """Returns the ids of the special tokens that the original config.json names."""
    content = read_json_object(original / CONFIG_NAME)
    return {name: content[name] for name in SPECIAL_TOKENS if content.get(name) is not None}


def plain_encoder(directory: Path) -> Callable[[str], list[int]]:
    """Returns the function from text to ids of the tokenizer in `directory`; it adds no tokens.

    Raises `UserError` if there is no tokenizer.json and no tokenizer.model, or if it is broken.
    """
    path = own_tokenizer(directory)
    if path is None:
        raise UserError(
            f"{directory}: no tokenizer.json and no tokenizer.model, which the comparison of "
            "logits needs; put the model's tokenizer there, or convert without the check "
            "(--skip-check)"
        )
    return open_tokenizer(path).encode
