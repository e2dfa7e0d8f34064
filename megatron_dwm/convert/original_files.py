"""A model that came from Hugging Face goes out as it came, but for its weights.

Its checkpoints keep its other files (training/kept_files.py): configuration, settings of
generation, tokenizer, chat templates, licence. They are put back byte for byte; of config.json only
what training changed is written anew, and every change comes back in words, for the model card.
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
    check_huggingface_config,
    read_json_object,
)
from megatron_dwm.convert.huggingface import SPECIAL_TOKENS
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.on_disk.huggingface_files import shape_of
from megatron_dwm.tokenizer import open_tokenizer

_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True, kw_only=True)
class PutBack:
    """context_tokens: the longest sequence by config.json. changes: what differs, a line each."""

    context_tokens: int
    changes: tuple[str, ...]


def put_back(
    carried: Path,
    directory: Path,
    *,
    shape: LlamaShape,
    dtype: torch.dtype,
    trained_tokens: int,
    special_tokens: dict[str, Any] | None,
) -> PutBack:
    """Copy the files that a checkpoint keeps into an export.

    Args:
        carried: the checkpoint's folder of them.
        directory: the export.
        shape: the checkpoint's, which has to be what config.json describes.
        dtype: what the export keeps parameters in.
        trained_tokens: tokens in a sequence of training; 0 for a model that was not trained here.
        special_tokens: ids of another tokenizer, with which the model was trained; its files are
            then left out. None for the model's own.

    Raises `UserError` if config.json describes another model.
    """
    config = read_json_object(carried / CONFIG_NAME)
    described = check_huggingface_config(config, carried / CONFIG_NAME)
    if shape_of(described) != shape:
        raise UserError(
            f"{carried / CONFIG_NAME} describes another model than shape.json of the checkpoint; "
            "the checkpoint is damaged"
        )
    for path in sorted(carried.rglob("*")):
        name = path.relative_to(carried)
        is_words = any(name.match(pattern) for pattern in TOKENIZER_FILES)
        if path.is_file() and not (is_words and special_tokens is not None):
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, directory / name)
    changed, changes = _changes(config, described.context_tokens, dtype, trained_tokens)
    _write_changed({**changed, **(special_tokens or {})}, directory / CONFIG_NAME)
    _write_changed(special_tokens or {}, directory / SETTINGS_FILES[1])
    return PutBack(
        context_tokens=max(described.context_tokens, trained_tokens), changes=tuple(changes)
    )


def _changes(
    config: dict[str, Any], context_tokens: int, dtype: torch.dtype, trained_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """The keys of config.json with other values than they came with, and what that says."""
    changed: dict[str, Any] = {}
    changes = []
    now = str(dtype).removeprefix("torch.")
    named = [key for key in _DTYPE_KEYS if config.get(key) is not None]
    before = config[named[0]] if named else "float32"
    if any(config[key] != now for key in named) or before != now:
        changed |= dict.fromkeys(named or _DTYPE_KEYS[1:], now)
        changes.append(f"parameters are kept in {now}; they came in {before}")
    if trained_tokens > context_tokens:
        changed["max_position_embeddings"] = trained_tokens
        changes.append(
            f"the context is {trained_tokens:,} tokens, as long as the sequences of training; it "
            f"came with {context_tokens:,}"
        )
    elif 0 < trained_tokens < context_tokens:
        changes.append(
            f"training read sequences of {trained_tokens:,} tokens; the context of "
            f"{context_tokens:,} tokens is what the model came with"
        )
    return changed, changes


def _write_changed(values: dict[str, Any], path: Path) -> None:
    """Set keys of a JSON file; without any it stays byte for byte."""
    if values and path.is_file():
        content = {**read_json_object(path), **values}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def special_tokens(carried: Path) -> dict[str, Any]:
    """The ids of the model's special tokens, as its own config.json has them."""
    content = read_json_object(carried / CONFIG_NAME)
    return {name: content[name] for name in SPECIAL_TOKENS if content.get(name) is not None}


def plain_encoder(directory: Path) -> Callable[[str], list[int]]:
    """Text to ids, nothing added, by the tokenizer in `directory`.

    Raises `UserError` if there is neither a tokenizer.json nor a tokenizer.model, or it is broken.
    """
    path = own_tokenizer(directory)
    if path is None:
        raise UserError(
            f"{directory}: no tokenizer.json and no tokenizer.model, which the comparison of "
            "logits needs; put the model's tokenizer there, or convert without the check "
            "(--skip-check)"
        )
    return open_tokenizer(path).encode
