"""`PREFIX.NAME.losses`: the loss of every token of an indexed dataset under one model.

    4096 bytes  a line of JSON (`TokenLossHeader`), filled up with spaces
    float32     a loss for every token of the `.bin`, in its order, in nats; NaN for the first token
                of a document, which nothing predicts

So the loss of token k is at byte 4096 + 4 k. The header has a digest of the `.bin` and the `.idx`:
losses of other tokens are refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.files.dataset_paths import DatasetPaths
from megatron_dwm.files.digest import digest_of_files

HEADER_BYTES = 4096
_FORMAT = "token losses, version 1"


@dataclass(frozen=True, kw_only=True)
class TokenLossHeader:
    """What a file of losses says of itself."""

    model: str
    """the model, as the user named it"""
    model_digest: str
    """digest of its weights"""
    precision: str
    context_tokens: int
    """a token's loss has at most as many tokens before it"""
    num_tokens: int
    data_digest: str
    """digest of the `.bin` and the `.idx`"""

    def packed(self) -> bytes:
        """The bytes before the losses."""
        line = json.dumps({"format": _FORMAT, **asdict(self)}).encode()
        assert len(line) < HEADER_BYTES, "the name of a model is a path"
        return line.ljust(HEADER_BYTES - 1) + b"\n"


def losses_path(prefix: str, name: str) -> Path:
    """The file of the losses `name` of the dataset with this prefix."""
    return Path(f"{prefix}.{name}.losses")


def data_digest(prefix: str) -> str:
    """The digest of a dataset that a header has."""
    paths = DatasetPaths.of(prefix)
    return digest_of_files([paths.bin, paths.idx])


def read_header(path: Path) -> TokenLossHeader:
    """Read the header. Raises OSError, or ValueError, a line that names `path`, if it is none."""
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    try:
        content = json.loads(start)
        if content.pop("format") != _FORMAT:
            raise ValueError
        header = TokenLossHeader(**content)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: no file of token losses of this version; write it with "
            f"{name_of_command('score')} --token-losses"
        ) from None
    size_bytes = HEADER_BYTES + 4 * header.num_tokens
    if path.stat().st_size != size_bytes:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, expected {size_bytes}; it was cut short, write "
            "it again"
        )
    return header


def map_losses(path: Path, header: TokenLossHeader) -> np.ndarray:
    """The losses as a mapped array, float32 [tokens]; nothing is read yet."""
    return np.memmap(path, np.float32, "r", offset=HEADER_BYTES, shape=(header.num_tokens,))
