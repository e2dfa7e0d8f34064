"""Cheap checks of the training data, before any process group or model exists.

Cost per prefix: a few reads of headers and footers, up to 16 million token ids if no sidecar says
which tokenizer made them, and the lengths of all documents without `data.border_loss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_dwm.config.blend import BlendPart, parse_blend
from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.document_counts import document_lengths
from megatron_dwm.data.domains import check_sidecar, check_tokenizer
from megatron_dwm.data.prefixes import IndexedFile, read_indexed_file
from megatron_dwm.data.shares import ReadSteps, shares_of_samples

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer


# Every epoch has its own order, which costs some milliseconds and three files, and text that was
# read so often teaches nothing new.
MAX_EPOCHS = 1000


def check_data(config: DataConfig, tokenizer: Tokenizer, *reads: ReadSteps | None) -> None:
    """Check that `config.train` can be read with `tokenizer` at `config.sequence_length`.

    reads: when the samples of each stream of the run are read; None for a stream without any.

    Raises:
        UserError: the list is malformed; a file is missing, broken, shorter than one sample or
            read more than `MAX_EPOCHS` times; no label counts; a sidecar does not fit its index; or
            the data was made with another tokenizer.
    """
    if config.sequence_length < 1:
        raise UserError(f"data.sequence_length is {config.sequence_length}: must be at least 1")
    parts = parse_blend(config.train)
    files = [read_indexed_file(part.prefix) for part in parts]
    for file in files:
        check_length(file, config.sequence_length)
    for each in reads:
        if each is not None:
            _check_epochs(parts, files, config, each)
    if not config.border_loss:
        _check_labels(files)
    for file in files:
        check_sidecar(file, config.domain_key)
        check_tokenizer(file, tokenizer)


def check_length(file: IndexedFile, sequence_length: int) -> None:
    """Check that `file` has at least one sample: `sequence_length` tokens and one after them.

    Raises:
        UserError: it is shorter.
    """
    if file.samples_per_epoch(sequence_length) == 0:
        raise UserError(
            f"{file.bin_path} holds {file.num_tokens} tokens: data.sequence_length "
            f"{sequence_length} needs at least {sequence_length + 1}; give a smaller one, or more "
            "text"
        )


def _check_epochs(
    parts: list[BlendPart], files: list[IndexedFile], config: DataConfig, reads: ReadSteps
) -> None:
    """Check that no file is read more than `MAX_EPOCHS` times, given its shares of the samples."""
    in_epoch = [file.samples_per_epoch(config.sequence_length) for file in files]
    shares = shares_of_samples(config, parts, in_epoch, reads)
    [wanted_P] = shares.before(np.array([reads.num_samples]))
    has_shares = "share in data.schedule" if config.schedule else "weight in data.train"
    for file, count, wanted in zip(files, in_epoch, wanted_P, strict=True):
        if wanted > MAX_EPOCHS * count:
            raise UserError(
                f"{file.bin_path}: {file.num_tokens} tokens are {count} samples of "
                f"data.sequence_length {config.sequence_length}, of which the run reads "
                f"{wanted:.0f}, each {wanted / count:.0f} times, expected at most {MAX_EPOCHS}; "
                "give a smaller data.sequence_length, training.global_batch_size, training.steps "
                f"or weighting.pool_batches, a smaller {has_shares}, or more text"
            )


def _check_labels(files: list[IndexedFile]) -> None:
    """Check that a document has a label of its own, as borders have none: two tokens or more."""
    if any(document_lengths(file).max(initial=0) > 1 for file in files):
        return
    raise UserError(
        f"data.border_loss false: no label would count, because no document of "
        f"{', '.join(file.prefix for file in files)} has more than one token; set it to true, or "
        "tokenize with --append-eod"
    )
