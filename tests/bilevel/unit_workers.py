"""What the ranks of the tests of documents as units run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, Hypergradient, Problem
from megatron_dwm.bilevel.hypergradient import first_order
from megatron_dwm.bilevel.tangent_probe import tangent_probe
from megatron_dwm.bilevel.virtual_step import CLIP_EPSILON
from megatron_dwm.model import LLM, MicroBatch, forward_only
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.weighting.groups import gather_over_data, units_of_replicas
from tests.bilevel.workers import TRAIN, VALIDATION, _moments_by_name, _textbook_step
from tests.documents import (
    document_losses,
    documents_of,
    last_hidden,
    packed_batch,
    weights_of,
)
from tests.tiny import MICRO_BATCH, Tiny, tiny

Options = dict[str, Any]


def alignments(
    options: Options, inner: str = "adam", flattened: bool = False, **layout: Any
) -> dict[str, Tensor]:
    """Returns the alignments of all documents, in order, and their weight gradients.

    flattened: the probe takes each micro-batch as one row.
    """
    with tiny(**layout) as subject:
        problem = _problem(subject, options, inner)
        found = first_order(problem, inner_products=_flat_probe if flattened else tangent_probe)
        counts = units_of_replicas(problem.train_batch, subject.runtime)
        return {
            name: gather_over_data(values_n, subject.runtime, counts)
            for name, values_n in (
                ("alignments", found.alignment_n),
                ("gradient", found.weight_gradient_n(problem)),
            )
        }


def _flat_probe(llm: LLM, micro_batches: list[MicroBatch]) -> Tensor:
    return tangent_probe(llm, [batch.flattened() for batch in micro_batches])


def _problem(subject: Tiny, options: Options, inner: str) -> Problem:
    return Problem(
        llm=subject.llm,
        optimizer=subject.optimizer,
        train_batch=packed_batch(TRAIN, subject.runtime, **options),
        weights_n=weights_of(subject.runtime),
        val_batch=packed_batch(VALIDATION, subject.runtime, **options),
        micro_batch_size=MICRO_BATCH,
        inner=inner,
    )


def by_hand(options: Options, inner: str = "adam", **model: Any) -> dict[str, Tensor]:
    """Returns what `alignments` does, by autograd in double precision on each document alone.

    The objective, clipping and Adam are their textbook formulas as functions of the weights.
    """
    with tiny(**model) as subject:
        shape, clip = subject.llm.shape, model.get("clip", 1.0)
        theta, moments = _theta(subject), _moments_by_name(subject)
        rate = subject.optimizer.param_groups[0]["lr"]
        train = packed_batch(TRAIN, subject.runtime, **options)
        losses_U = document_losses(shape, theta, train)
        gradients = [
            torch.autograd.grad(loss, list(theta.values()), retain_graph=True) for loss in losses_U
        ]
        weights_U = weights_of(subject.runtime).double().requires_grad_()
        share_U = _shares(train, options.get("equal", False))
        objective = [
            sum(s * w * g for s, w, g in zip(share_U, weights_U, of_units, strict=True))
            for of_units in zip(*gradients, strict=True)
        ]
        norm = torch.sqrt(sum(g.square().sum() for g in objective))
        factor = clip / (norm + CLIP_EPSILON) if clip and norm > clip else 1.0
        stepped = {
            name: _textbook_step(value.detach(), factor * g, moments[name], rate, inner)
            for (name, value), g in zip(theta.items(), objective, strict=True)
        }
        validation = packed_batch(VALIDATION, subject.runtime, **options)
        counts_U = torch.stack([mask.sum() for _, _, mask in documents_of(validation)])
        val_losses_U = document_losses(shape, stepped, validation)
        val_loss = (val_losses_U * counts_U).sum() / counts_U.sum()
        [gradient_U] = torch.autograd.grad(val_loss, weights_U)
        alignment_U = torch.where(share_U > 0, -gradient_U / (rate * share_U), 0.0)
        return {"alignments": alignment_U, "gradient": gradient_U}


def _theta(subject: Tiny) -> dict[str, Tensor]:
    named = subject.llm.modules[0].named_parameters()
    return {name: parameter.detach().double().requires_grad_() for name, parameter in named}


def _shares(train: Any, equal: bool) -> Tensor:
    """Returns [U]: each document's share of the objective, from the masks alone."""
    counts_U = torch.stack([mask.sum() for _, _, mask in documents_of(train)])
    sizes_U = (counts_U > 0).double() if equal else counts_U
    return sizes_U / sizes_U.sum()


def estimators(options: Options, inner: str = "adam", **model: Any) -> list[Tensor]:
    """Returns the alignments by the tangent probe, by unroll and by finite difference."""
    with tiny(**model) as subject:
        problem = _problem(subject, options, inner)
        names = ("tangent_probe", "unroll", "finite_difference")
        found: list[Hypergradient] = [ESTIMATORS[name](problem) for name in names]
        return [each.alignment_n for each in found]


def halves(options: Options, **layout: Any) -> tuple[Tensor, Tensor]:
    """Returns alignments as the halves' weighted sum, and of the whole validation batch."""
    with tiny(**layout) as subject:
        problem = _problem(subject, options, "adam")
        of_halves = ESTIMATORS["tangent_probe"](problem, halves=True)
        return of_halves.alignment_n, ESTIMATORS["tangent_probe"](problem).alignment_n


def losses_and_features(
    options: Options, early_layer: int = 1, flattened: bool = False, **layout: Any
) -> dict[str, Tensor]:
    """Returns losses and features of all units, in order."""
    with tiny(steps=0, **layout) as subject:
        batch = packed_batch(TRAIN, subject.runtime, **options)
        passes = unit(batch, MICRO_BATCH)
        if flattened:
            passes = [each.flattened() for each in passes]
        found = forward_only(subject.llm, passes, early_layer=early_layer)
        assert found.features is not None
        values = {
            "losses": found.unit_losses_n,
            "early": found.features.early_nD,
            "final": found.features.final_nD,
        }
        counts = units_of_replicas(batch, subject.runtime)
        return {
            name: gather_over_data(value, subject.runtime, counts) for name, value in values.items()
        }


def losses_and_features_by_hand(
    options: Options, early_layer: int = 1, **model: Any
) -> dict[str, Tensor]:
    """Returns what `losses_and_features` does, from each document run alone."""
    with tiny(steps=0, **model) as subject, torch.no_grad():
        shape, theta = subject.llm.shape, _theta(subject)
        batch = packed_batch(TRAIN, subject.runtime, **options)
        states = [last_hidden(shape, theta, tokens) for tokens, _, _ in documents_of(batch)]
        early, final = ([of[place][0] for of in states] for place in (early_layer - 1, -1))
        losses_U = document_losses(shape, theta, batch)
        if options.get("unit") == "sample":
            return _of_rows(batch, losses_U, early, final)
        means = {"early": early, "final": final}
        return {
            "losses": losses_U,
            **{name: torch.stack([h.mean(0) for h in all_]) for name, all_ in means.items()},
        }


def _of_rows(
    batch: Any, losses_P: Tensor, early: list[Tensor], final: list[Tensor]
) -> dict[str, Tensor]:
    """Join the documents of each row."""
    counts_P = torch.stack([mask.sum() for _, _, mask in documents_of(batch)])
    numbers = (batch.borders_BS.amax(dim=1) + 1).tolist()
    pairs = zip((losses_P * counts_P).split(numbers), counts_P.split(numbers), strict=True)
    length = batch.tokens_BS.shape[1]
    return {
        "losses": torch.stack([sums.sum() / counts.sum() for sums, counts in pairs]),
        "early": torch.cat(early).view(batch.size, length, -1).mean(dim=1),
        "final": torch.cat(final).view(batch.size, length, -1).mean(dim=1),
    }
