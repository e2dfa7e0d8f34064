"""The loss of every token under a model, in a file beside the data (files/token_losses.py).

Training with policy excess_loss reads it in place of running the reference: the reference then
costs one pass over the data, once, instead of one in every step of every run.

A document is read alone, as training reads it if attention stops at borders. Documents longer than
the context are read in windows (windows.py). Losses are computed as training computes them, over
the padded vocabulary. Cost: one forward pass, and 4 bytes a token on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import require_writable_parents, sole_writer, why_unwritable
from megatron_dwm.files.atomic import new_file
from megatron_dwm.files.token_losses import TokenLossHeader, data_digest, losses_path
from megatron_dwm.selection.language_model import (
    LanguageModel,
    ModelFiles,
    Precision,
    check_model,
    open_model,
)
from megatron_dwm.selection.pool import Pool, open_pool
from megatron_dwm.selection.record import inputs_of
from megatron_dwm.selection.select import Progress
from megatron_dwm.selection.windows import ScannedSpan, scan


def write_token_losses(
    prefix: str,
    name: str,
    model: str,
    progress: Progress,
    *,
    precision: Precision = "fp32",
    context_tokens: int | None = None,
    replaces: bool = False,
) -> TokenLossHeader:
    """Write `PREFIX.NAME.losses`, all of it or nothing.

    context_tokens: longest window; None: the model's own context.
    Raises `UserError` for a dataset or model that cannot be used, and a file that is there or that
    another process is writing.
    """
    if "/" in name or not name:
        raise UserError(f"--token-losses {name}: expected a name without /, part of a file's name")
    pool = open_pool(prefix)
    _require_whole_documents(pool)
    path = losses_path(pool.prefix, name)
    _refuse_unasked(path, replaces=replaces)
    require_writable_parents([path])
    files = check_model(model, pool)
    header = TokenLossHeader(
        model=str(files.directory),
        model_digest=files.digest,
        precision=precision,
        context_tokens=context_tokens or files.context_tokens,
        num_tokens=int(pool.tokens_D.sum()),
        data_digest=data_digest(pool.prefix),
    )
    before = inputs_of(pool)
    try:
        with sole_writer(path), new_file(path) as partial:
            _refuse_unasked(path, replaces=replaces)  # another process may have written it since
            with partial.open("wb") as output:
                output.write(header.packed())
                for losses_T in _losses(pool, files, header, progress):
                    output.write(losses_T.tobytes())
            if inputs_of(pool) != before:
                raise UserError(f"{pool.prefix}: changed while it was read; begin again")
    except OSError as error:
        words = why_unwritable(error)
        if words is None:
            raise
        raise UserError(f"{path}: cannot be written ({words})") from None
    return header


def _refuse_unasked(path: Path, *, replaces: bool) -> None:
    if path.exists() and not replaces:
        raise UserError(f"{path} exists; pass --replace to write it again, or choose another name")


def _losses(
    pool: Pool, files: ModelFiles, header: TokenLossHeader, progress: Progress
) -> Iterator[np.ndarray]:
    """Yields float32, the losses of the tokens of some documents, in the order of the data."""
    precision: Precision = "bf16" if header.precision == "bf16" else "fp32"
    name, vocab_size = str(files.directory), files.shape.vocab_size
    with open_model(files, precision, header.context_tokens) as model:
        for scanned in scan(pool, vocab_size, name, header.context_tokens, progress):
            losses_T = _of_span(model, scanned)
            is_first_T = np.zeros(len(losses_T), dtype=bool)
            lengths_D = scanned.tokens.lengths_D
            is_first_T[(np.cumsum(lengths_D) - lengths_D)[lengths_D > 0]] = True
            if not np.isfinite(losses_T[~is_first_T]).all():
                raise UserError(f"--model {name}: gives a loss that is not finite; it is damaged")
            yield losses_T


def _of_span(model: LanguageModel, scanned: ScannedSpan) -> np.ndarray:
    losses_T = np.full(len(scanned.tokens.ids), np.nan, dtype=np.float32)
    for chosen_B, batch in scanned.batches(tokens_are_units=True):
        is_label_BS = batch.loss_mask_BS.numpy() > 0
        places_S = np.arange(is_label_BS.shape[1])
        labels_BS = scanned.windows.begins_W[chosen_B][:, None] + places_S + 1
        losses_T[labels_BS[is_label_BS]] = model.training_losses(batch).numpy()[is_label_BS]
    return losses_T


def _require_whole_documents(pool: Pool) -> None:
    header = pool.dataset.header
    if header.num_sequences != int(np.count_nonzero(pool.tokens_D)):
        raise UserError(
            f"{pool.dataset.paths.idx}: has documents of several sequences, which training "
            "shuffles apart, so that a token's loss depends on the order; write one sequence a "
            "document"
        )
