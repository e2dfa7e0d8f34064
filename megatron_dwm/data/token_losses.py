"""Losses of every token of the training data under a reference model, from files beside it.

`tools/score_data.py --token-losses NAME` writes `PREFIX.NAME.losses` (files/token_losses.py). A
method declares that it reads them (weighting/method.py, `token_losses`) and finds them in
`Batch.reference_losses_BS`. They are mapped: a sample costs the read of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dwm.config.blend import parse_blend
from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.files.token_losses import data_digest, losses_path, map_losses, read_header


@dataclass(frozen=True)
class TokenLosses:
    """Mapped float32 losses, one a token of the `.bin`, for every prefix of `data.train`."""

    of_prefixes: tuple[np.ndarray, ...]


def token_loss_files(data: DataConfig, name: str) -> list[Path]:
    """Returns the file of every prefix of `data.train`."""
    return [losses_path(part.prefix, name) for part in parse_blend(data.train)]


def open_token_losses(data: DataConfig, key: str, name: str) -> TokenLosses:
    """Open the losses `name` of every prefix.

    key: the configuration key that names them.

    Raises:
        UserError: a file is missing, damaged, or of other data; or the models are not the same.
    """
    found, models = [], {}
    for part, path in zip(parse_blend(data.train), token_loss_files(data, name), strict=True):
        if not path.is_file():
            raise UserError(
                f"{key} {name}: no file {path}; write it with {name_of_command('score')} "
                f"--input {part.prefix} --token-losses {name}"
            )
        try:
            header = read_header(path)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None
        if header.data_digest != data_digest(part.prefix):
            raise UserError(
                f"{key}: {path} has the losses of other data ({header.data_digest} when they were "
                f"written, {part.prefix}.bin and .idx are {data_digest(part.prefix)}); write it "
                "again"
            )
        models[header.model_digest] = path
        found.append(map_losses(path, header))
    if len(models) > 1:
        first, other, *_ = models.values()
        raise UserError(f"{key}: {first} and {other} are of two models; expected one reference")
    return TokenLosses(tuple(found))
