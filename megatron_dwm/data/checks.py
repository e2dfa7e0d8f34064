"""Cheap checks of the training data, before any process group or model exists.

Cost per prefix: a few reads of headers and footers, up to 16 million token ids if no sidecar says
which tokenizer made them, and the lengths of all documents without `data.border_loss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig
from megatron_dwm.data.document_counts import document_lengths
from megatron_dwm.data.domains import check_sidecar, check_tokenizer
from megatron_dwm.data.prefixes import BlendPart, IndexedFile, parse_blend, read_indexed_file

if TYPE_CHECKING:
    from megatron_dwm.tokenizer import Tokenizer


# Every epoch has its own order, which costs some milliseconds and three files, and text that was
# read so often teaches nothing new.
MAX_EPOCHS = 1000


def check_data(
    config: DataConfig, tokenizer: Tokenizer, num_samples: int, *, pool_batches: int = 1
) -> None:
    """Check that `config.train` can be read with `tokenizer` at `config.sequence_length`.

    num_samples: number of samples that the run reads. pool_batches: global batches that a step
        reads of them.

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
    _check_epochs(parts, files, config.sequence_length, num_samples, pool_batches)
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
    parts: list[BlendPart],
    files: list[IndexedFile],
    sequence_length: int,
    num_samples: int,
    pool_batches: int,
) -> None:
    """Check that no file is read more than `MAX_EPOCHS` times, given its share of the samples."""
    in_epoch = [file.samples_per_epoch(sequence_length) for file in files]
    # Without weights the shares follow the sizes.
    shares = [part.weight or count for part, count in zip(parts, in_epoch, strict=True)]
    pools = pool_batches > 1
    why = f" ({pool_batches} global batches a step, weighting.pool_batches)" if pools else ""
    keys = f"{'weighting.pool_batches, ' if pools else ''}data.sequence_length"
    for file, count, share in zip(files, in_epoch, shares, strict=True):
        wanted = num_samples * share / sum(shares)
        if wanted > MAX_EPOCHS * count:
            raise UserError(
                f"{file.bin_path}: {file.num_tokens} tokens are {count} samples of "
                f"data.sequence_length {sequence_length}, of which the run reads {wanted:.0f}"
                f"{why}, each {wanted / count:.0f} times, expected at most {MAX_EPOCHS}; give a "
                f"smaller {keys}, training.global_batch_size or training.steps, a smaller weight "
                "in data.train, or more text"
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
