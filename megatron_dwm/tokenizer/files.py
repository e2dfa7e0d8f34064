"""Reads a tokenizer's file, with a one-line error if that fails."""

from __future__ import annotations

from pathlib import Path

from megatron_dwm.config.errors import UserError


def read_tokenizer_file(path: Path) -> bytes:
    """Returns the content of `path`. Raises `UserError` if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer model file") from None
    except OSError as error:
        raise UserError(f"{path}: the tokenizer model cannot be read: {error.strerror}") from None
