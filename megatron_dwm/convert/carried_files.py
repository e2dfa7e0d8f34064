"""Files of a Hugging Face model that a checkpoint of ours carries along: its tokenizer.

`from-hf` puts them into the checkpoint, and `to-hf` of a model that was not trained since, or that
was trained with that very tokenizer, puts them back as they were.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dwm.config import UserError
from megatron_dwm.convert.huggingface import SPECIAL_TOKENS
from megatron_dwm.tokenizer import open_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_CONFIG = "config.json"


def carry(source: Path, directory: Path) -> None:
    """Copy the tokenizer's files and config.json from Hugging Face directory `source`."""
    directory.mkdir()
    for name in (*TOKENIZER_FILES, _CONFIG):
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def put_back(carried: Path, directory: Path) -> None:
    """Copy the tokenizer's files that `carry` kept into an export."""
    for name in TOKENIZER_FILES:
        if (carried / name).is_file():
            shutil.copyfile(carried / name, directory / name)


def special_tokens(carried: Path) -> dict[str, Any]:
    """The ids of the model's special tokens, as its own config.json has them."""
    content = json.loads((carried / _CONFIG).read_text(encoding="utf-8"))
    return {name: content[name] for name in SPECIAL_TOKENS if content.get(name) is not None}


def plain_encoder(directory: Path) -> Callable[[str], list[int]]:
    """Text to ids, nothing added, by the tokenizer in `directory`.

    Raises `UserError` if there is neither a tokenizer.json nor a tokenizer.model, or it is broken.
    """
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return open_tokenizer(directory / name).encode
    raise UserError(
        f"{directory}: no tokenizer.json and no tokenizer.model, which the comparison of logits "
        "needs; put the model's tokenizer there, or convert without the check (--skip-check)"
    )
