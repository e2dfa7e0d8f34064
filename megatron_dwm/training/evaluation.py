"""The held-out loss of the model during training, by domain, and its accuracy on last words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dwm.data import EvaluationSet
from megatron_dwm.data.last_words import LastWords
from megatron_dwm.model.passes.predictions import predict
from megatron_dwm.training.last_words import last_word_figures
from megatron_dwm.training.learner import Learner


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out text: packed rows, and the same passages with their last words.

    Both are needed, since a last word is predicted from its own passage alone, and a packed row has
    several passages.
    """

    rows: EvaluationSet
    last_words: LastWords


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of an evaluation.

    losses: token-mean loss of every domain, in nats. figures: those of last words, by column name.
    """

    losses: dict[str, float]
    figures: dict[str, float | dict[str, float]]

    def columns(self) -> dict[str, float | dict[str, float]]:
        """Returns everything by its name in metrics.jsonl; `loss` is the mean over domains."""
        losses = self.losses
        return {
            "loss": sum(losses.values()) / len(losses),
            "domain_loss": losses,
            "domain_perplexity": {n: math.exp(min(loss, 700.0)) for n, loss in losses.items()},
            **self.figures,
        }


def evaluate(
    learner: Learner, held_out: HeldOut, *, batch_size: int, between: Callable[[], None]
) -> Evaluation:
    """Evaluate the LLM without the rows that pad its vocabulary, as it is exported (collective).

    batch_size: rows in one pass over all replicas. between: called after every batch.
    """
    return Evaluation(
        losses=_losses(learner, held_out.rows, batch_size, between),
        figures=last_word_figures(
            learner, held_out.last_words, batch_size=batch_size, between=between
        ),
    )


def _losses(
    learner: Learner, rows: EvaluationSet, batch_size: int, between: Callable[[], None]
) -> dict[str, float]:
    """Returns the token-mean loss of every domain (collective)."""
    runtime, domains = learner.runtime, rows.domains
    sums = torch.zeros(2, len(domains), dtype=torch.float64)
    share = batch_size // runtime.data_size
    first = runtime.data_rank * share
    for whole in rows.batches(batch_size):
        batch = whole.rows(first, first + share).to(runtime.device)
        found = predict(learner.llm, batch, learner.micro_batch_size)
        losses_n = -(found.log_likelihood_BS * batch.loss_mask_BS).double().sum(dim=1)
        where = torch.tensor([_index(domains, name) for name in batch.domains])
        sums[0].index_add_(0, where, losses_n.cpu())
        sums[1].index_add_(0, where, batch.loss_mask_BS.double().sum(dim=1).cpu())
        between()
    sums = sums.to(runtime.device)
    dist.all_reduce(sums, group=runtime.data_group)
    return dict(zip(domains, (sums[0] / sums[1]).tolist(), strict=True))


def _index(domains: list[str], name: str) -> int:
    """Returns the index of a domain; 0 for padding rows, which count no tokens."""
    return domains.index(name) if name in domains else 0
