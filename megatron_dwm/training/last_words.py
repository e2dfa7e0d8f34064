"""Last-word accuracy of the model during training, under any parallel layout, without an export.

The figures equal lm-evaluation-harness's on the exported model (`acc` and `perplexity` of
examples/tasks/lastword.yaml), so the run shows the metric of its final evaluation. Cost: one
forward pass of every passage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dwm.data.last_words import LastWords
from megatron_dwm.model import LLM
from megatron_dwm.model.passes.predictions import predict
from megatron_dwm.training.learner import Learner


@dataclass(frozen=True, kw_only=True)
class LastWordScore:
    """Score of the last words of one domain.

    accuracy: fraction of passages in which every token of the last word is the most likely one.
    perplexity: exp of minus the mean log-likelihood of a last word (all its tokens together).
    """

    accuracy: float
    perplexity: float
    passages: int


def last_word_scores(
    llm: LLM,
    words: LastWords,
    *,
    batch_size: int,
    micro_batch_size: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, LastWordScore]:
    """Returns the score of every domain of `words`; a collective call.

    batch_size: rows in one pass over all replicas; micro_batch_size: rows in one forward pass.
    between: called after every batch.
    """
    sums_3D = torch.zeros(3, len(words.domains), dtype=torch.float64)
    share = batch_size // llm.runtime.data_size
    first = llm.runtime.data_rank * share
    for whole in words.batches(batch_size):
        batch = whole.rows(first, first + share).to(llm.runtime.device)
        found = predict(llm, batch, micro_batch_size)
        asked_BS = batch.loss_mask_BS > 0
        right_B = (found.is_likeliest_BS | ~asked_BS).all(dim=1)
        likelihood_B = (found.log_likelihood_BS.double() * asked_BS).sum(dim=1)
        counts_B = asked_BS.any(dim=1)  # False for padding rows of the last batch
        where = torch.tensor([words.domains.index(name) for name in batch.domains])
        values_3B = torch.stack([right_B & counts_B, likelihood_B, counts_B])
        sums_3D.index_add_(1, where, values_3B.double().cpu())
        between()
    sums_3D = sums_3D.to(llm.runtime.device)
    dist.all_reduce(sums_3D, group=llm.runtime.data_group)
    rows = zip(words.domains, sums_3D.T.tolist(), strict=True)
    return {
        name: LastWordScore(
            accuracy=right / passages,
            # The exp of an untrained model may exceed the largest float.
            perplexity=math.exp(min(-likelihood / passages, 700.0)),
            passages=int(passages),
        )
        for name, (right, likelihood, passages) in rows
    }


def last_word_figures(
    learner: Learner, words: LastWords, *, batch_size: int, between: Callable[[], None]
) -> dict[str, float | dict[str, float]]:
    """Returns the columns of metrics.jsonl about last words; a collective call.

    last_word_accuracy is over all passages; domain_last_word_accuracy and
    domain_last_word_perplexity are by domain. Empty if no passage has a last word that can count.
    """
    if not words.num_rows:
        return {}
    scores = last_word_scores(
        learner.llm,
        words,
        batch_size=batch_size,
        micro_batch_size=learner.micro_batch_size,
        between=between,
    )
    right = sum(score.accuracy * score.passages for score in scores.values())
    return {
        "last_word_accuracy": right / words.num_rows,
        "domain_last_word_accuracy": {name: s.accuracy for name, s in scores.items()},
        "domain_last_word_perplexity": {name: s.perplexity for name, s in scores.items()},
    }
