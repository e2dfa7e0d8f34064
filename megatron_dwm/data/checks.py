"""Cheap checks of the training data, before any process group or model exists.

Costs a few reads of headers and footers a prefix, and at most 16 million token ids of a prefix
that does not say which tokenizer made it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.domains import check_sidecar, check_tokenizer
from megatron_dwm.data.prefixes import IndexedFile, parse_blend, read_indexed_file

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer


def check_data(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Check that `config.train` can be read with `tokenizer` at `config.sequence_length`.

    Raises:
        UserError: the list is malformed; a file is missing, broken or shorter than one sample; a
            sidecar does not fit its index; or the data was made with another tokenizer.
    """
    if config.sequence_length < 1:
        raise UserError(f"data.sequence_length is {config.sequence_length}: must be at least 1")
    for part in parse_blend(config.train):
        file = read_indexed_file(part.prefix)
        check_length(file, config.sequence_length)
        check_sidecar(file, config.domain_key)
        check_tokenizer(file, tokenizer)


def check_length(file: IndexedFile, sequence_length: int) -> None:
    """Check that `file` holds one sample: `sequence_length` tokens and one to predict after them.

    Raises:
        UserError: it does not.
    """
    if file.samples_per_epoch(sequence_length) == 0:
        raise UserError(
            f"{file.bin_path} holds {file.num_tokens} tokens: data.sequence_length "
            f"{sequence_length} needs at least {sequence_length + 1}"
        )
