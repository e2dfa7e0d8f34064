"""What the ranks of the tests of alignments inside the training pass run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dwm.bilevel import AheadProbe, Hypergradient, Target, directions_ahead
from megatron_dwm.data import Batch
from megatron_dwm.model import clear_gradients, forward_backward
from megatron_dwm.model.passes.objective import weighted, weighted_denominator
from megatron_dwm.weighting.groups import gather_over_data, units_of_replicas
from tests.bilevel.unit_workers import _theta
from tests.bilevel.workers import TRAIN, VALIDATION, _losses, _moments_by_name
from tests.documents import document_losses, documents_of, packed_batch, weights_of
from tests.tiny import MICRO_BATCH, Tiny, tiny

Options = dict[str, Any] | None


def alignments(
    options: Options = None,
    inner: str = "adam",
    fraction: float = 1.0,
    dtype: str = "float32",
    halves: bool = False,
    **layout: Any,
) -> dict[str, Any]:
    """Returns alignments of the global batch by name, and whether the gradient is unchanged.

    options: documents are the units, with these options; None: rows are.
    """
    with tiny(**layout) as subject:
        batch, target, weights_n = _batch(subject, TRAIN, options), None, subject.weights_n
        if options is not None:
            weights_n = weights_of(subject.runtime)
        plain = _pass(subject, batch, weights_n, None)
        target = Target(
            llm=subject.llm,
            optimizer=subject.optimizer,
            val_batch=_batch(subject, VALIDATION, options),
            micro_batch_size=MICRO_BATCH,
            inner=inner,
        )
        directions = directions_ahead(target, getattr(torch, dtype), halves=halves)
        probe = AheadProbe(subject.llm, directions, fraction=fraction)
        carried = _pass(subject, batch, weights_n, probe)
        found = probe.hypergradient(batch, weights_n)
        return {
            "gradient unchanged": all(map(torch.equal, plain, carried)),
            "gradient formed": any(bool(buffer.abs().max() > 0) for buffer in carried),
            "val_loss": found.val_loss,
            **_gathered(subject, batch, found),
        }


def _batch(subject: Tiny, number: int, options: Options) -> Batch:
    if options is None:
        return subject.batch(number)
    return packed_batch(number, subject.runtime, **options)


def _pass(subject: Tiny, batch: Batch, weights_n: Tensor, probe: AheadProbe | None) -> list[Tensor]:
    """Run the weighted pass, with the probe if there is one; returns the gradient buffers."""
    llm = subject.llm
    clear_gradients(llm, subject.optimizer)
    micro_batches = weighted(batch, weights_n, MICRO_BATCH)
    denominator = weighted_denominator(batch)
    if probe is None:
        forward_backward(llm, micro_batches, denominator=denominator)
    else:
        with probe.attached(micro_batches) as enter:
            forward_backward(llm, micro_batches, denominator=denominator, on_micro_batch=enter)
    return [parameter.main_grad.clone() for parameter in llm.parameters()]


def _gathered(subject: Tiny, batch: Batch, found: Hypergradient) -> dict[str, Tensor]:
    counts = units_of_replicas(batch, subject.runtime)
    assert found.known_n is not None
    values = {"alignments": found.alignment_n, "known": found.known_n.float()}
    if found.halves_2n is not None:
        values |= {"first": found.halves_2n[0], "second": found.halves_2n[1]}
    return {
        name: gather_over_data(value_n, subject.runtime, counts) for name, value_n in values.items()
    }


def sum_and_inner_product(**layout: Any) -> tuple[float, float, float]:
    """Returns sum_u c_u s_u over the denominator; <z, g> with the gradient of the pass; |terms|.

    Both are the same by definition, in every precision: g is the gradient that training steps with.
    """
    with tiny(**layout) as subject:
        batch, llm, weights_n = subject.batch(TRAIN), subject.llm, subject.weights_n
        target = Target(
            llm=llm,
            optimizer=subject.optimizer,
            val_batch=subject.batch(VALIDATION),
            micro_batch_size=MICRO_BATCH,
        )
        [direction] = directions_ahead(target)
        probe = AheadProbe(llm, [direction])
        gradient = _pass(subject, batch, weights_n, probe)
        terms_n = weights_n * probe.hypergradient(batch, weights_n).alignment_n / batch.size
        pairs = zip(llm.parameters(), gradient, strict=True)
        inner = sum(float((direction.slice_of(p).double() * g).sum()) for p, g in pairs)
        return float(terms_n.double().sum()), inner, float(terms_n.abs().sum())


def by_hand(options: Options = None, inner: str = "adam", **model: Any) -> dict[str, Any]:
    """Returns alignments and L_val(theta) by autograd in double precision, from the model's logits.

    The direction is METHOD.md's, section 9, from the moments by its formulas.
    """
    with tiny(**model) as subject:
        theta, moments = _theta(subject), _moments_by_name(subject)
        val_loss = _val_loss(subject, theta, options)
        gradients = torch.autograd.grad(val_loss, list(theta.values()))
        z = [
            _preconditioned(gradient, *moments[name], inner)
            for name, gradient in zip(theta, gradients, strict=True)
        ]
        found = []
        for loss in _unit_losses(subject, theta, options):
            parts = torch.autograd.grad(loss, list(theta.values()), retain_graph=True)
            found.append(sum((a * b).sum() for a, b in zip(parts, z, strict=True)))
        return {"alignments": torch.stack(found).detach(), "val_loss": float(val_loss)}


def _preconditioned(
    gradient: Tensor, _: Tensor, second: Tensor, step: int, group: dict[str, Any], inner: str
) -> Tensor:
    if inner == "sgd":
        return gradient
    b1, b2 = group["betas"]
    root = (second.double() / (1 - b2**step)).sqrt()
    leading = (1 - b1) / (1 - b1 ** (step + 1)) / (root + group["eps"])
    return gradient * torch.where(root > 0, leading, 0.0)


def _val_loss(subject: Tiny, theta: dict[str, Tensor], options: Options) -> Tensor:
    validation = _batch(subject, VALIDATION, options)
    if options is None:
        losses_B = _losses(subject.llm.modules[0], theta, validation)
        counts_B = validation.loss_mask_BS.sum(dim=1)
        return (losses_B * counts_B).sum() / counts_B.sum()
    counts_U = torch.stack([mask.sum() for _, _, mask in documents_of(validation)])
    losses_U = document_losses(subject.llm.shape, theta, validation)
    return (losses_U * counts_U).sum() / counts_U.sum()


def _unit_losses(subject: Tiny, theta: dict[str, Tensor], options: Options) -> list[Tensor]:
    train = _batch(subject, TRAIN, options)
    if options is None:
        return list(_losses(subject.llm.modules[0], theta, train))
    return list(document_losses(subject.llm.shape, theta, train))
