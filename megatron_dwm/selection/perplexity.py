"""The loss of every document under a language model: columns `loss` and `perplexity`.

    loss = mean over the document's tokens but the first of -log p(token | those before it), nats
    perplexity = exp(loss)

A token is predicted from those before it in its window (windows.py), never from another document.
A document of one token predicts nothing. It gets the loss of a guess, the logarithm of the number
of ids, so that every document has a number; so does an empty one.

Cost: one forward pass of the model over all tokens.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_dwm.config import UserError
from megatron_dwm.preprocess.messages import warn
from megatron_dwm.selection.language_model import ModelFiles, Precision, open_model
from megatron_dwm.selection.pool import Pool
from megatron_dwm.selection.select import Progress
from megatron_dwm.selection.windows import scan


def document_losses(
    pool: Pool, files: ModelFiles, precision: Precision, context_tokens: int, progress: Progress
) -> np.ndarray:
    """Returns float64 [D], the mean loss of every document in nats per token.

    Raises `UserError` if a loss is not finite.
    """
    vocab_size, name = files.shape.vocab_size, str(files.directory)
    sums_D = np.zeros(pool.num_documents)
    with open_model(files, precision, context_tokens) as model:
        for scanned in scan(pool, vocab_size, name, context_tokens, progress):
            for chosen_B, batch in scanned.batches():
                sums_B = model.losses(batch).double().sum(dim=1).numpy()
                np.add.at(
                    sums_D, scanned.span.begin + scanned.windows.documents_W[chosen_B], sums_B
                )
    if not np.isfinite(sums_D).all():
        raise UserError(f"--model {name}: gives a loss that is not finite; it is damaged")
    predicted_D = np.maximum(pool.tokens_D - 1, 0)
    mean, guess = sums_D.sum() / max(predicted_D.sum(), 1), math.log(vocab_size)
    if mean > guess:
        warn(
            f"--model {name}: the mean loss is {mean:.3g} nats a token, a guess's is {guess:.3g}: "
            "was the data made with this model's tokenizer?"
        )
    return np.where(predicted_D > 0, sums_D / np.maximum(predicted_D, 1), math.log(vocab_size))
