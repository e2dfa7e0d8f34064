"""What the ranks of the tests of BLADE's reference run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import ModelConfig, ParallelConfig
from megatron_dwm.data import Batch
from megatron_dwm.model import build_llm
from megatron_dwm.model.layers.local import packed_pieces
from megatron_dwm.model.layers.pieces import pieces_of
from megatron_dwm.model.offload import Offload
from megatron_dwm.testing import SEQUENCE_LENGTH, TINY_TRAINING
from megatron_dwm.training.optimizer import build_optimizer
from megatron_dwm.weighting import dynamic_reference
from megatron_dwm.weighting.blade import Blade
from megatron_dwm.weighting.dynamic_reference import DynamicReference
from tests.tiny import MICRO_BATCH, Tiny, tiny
from tests.weighting.excess_workers import batch_of, config_of

PENALTY = 0.7


def reference_of(subject: Tiny, layout: dict[str, Any], learning_rate: float) -> DynamicReference:
    """An untrained reference with an optimizer of its own."""
    sharded = layout.get("sharded", False)
    parallel = ParallelConfig(
        tensor=layout.get("tensor", 1),
        pipeline=layout.get("pipeline", 1),
        sequence=layout.get("sequence", False),
        sharded_optimizer=sharded,
    )
    llm = build_llm(
        subject.llm.shape,
        ModelConfig(precision=layout.get("precision", "fp32")),
        parallel,
        subject.runtime,
        sequence_length=SEQUENCE_LENGTH,
        seed=77,
    )
    return DynamicReference(
        llm=llm,
        optimizer=build_optimizer(replace(TINY_TRAINING, clip_grad=0.0), llm, sharded=sharded),
        learning_rate=learning_rate,
        penalty=PENALTY,
        micro_batch_size=MICRO_BATCH,
    )


def blade_of(subject: Tiny, unit: str, layout: dict[str, Any], learning_rate: float) -> Blade:
    config = config_of(unit, "group", "global", 0.4)
    config = replace(config, policy=replace(config.policy, reference_steps=2))
    return Blade(config, reference_of(subject, layout, learning_rate), Offload())


def copied(**layout: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of the LLM, and of a reference that was copied and then took a step of rate 0."""
    with tiny(**layout) as subject:
        method = blade_of(subject, "document", layout, 0.0)
        batch = batch_of(subject.runtime, "document")
        assert method.reference_losses(batch) is None
        found = method.own_update(subject.llm, batch, subject.batch(5), TrainState())
        assert found is not None
        models = (subject.llm, method.dynamic.llm)
        return tuple([p.detach().clone() for p in model.parameters()] for model in models)


def copied_in_bf16(**layout: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The same in bf16, whose optimizer has its own fp32 copy of the parameters."""
    layout |= {"precision": "bf16"}
    with tiny(**layout) as subject:
        dynamic = reference_of(subject, layout, 1e-12)
        dynamic.copy_from(subject.llm)
        batch = batch_of(subject.runtime, "document")
        weights_U = torch.ones(batch.units.count)
        assert math.isfinite(dynamic.learn(batch, weights_U, subject.batch(5)).grad_norm)
        models = (subject.llm, dynamic.llm)
        return tuple([p.detach().clone() for p in model.parameters()] for model in models)


def updates(unit: str, before: int = 0, **layout: Any) -> dict[str, Tensor]:
    """Validation losses, gradient norms and weights of three steps of the reference, copied twice.

    before: updates of another method that the run had before.
    """
    with tiny(**layout) as subject:
        method = blade_of(subject, unit, layout, 1e-2)
        values, weights = [], []
        for number in range(3):
            batch = batch_of(subject.runtime, unit, number)
            state = TrainState(updates=before + number, stage_updates=number % 2)
            found = method.own_update(subject.llm, batch, subject.batch(9 + number), state)
            assert found is not None
            values.append([found.val_loss, found.grad_norm])
            weights.append(found.weights_n)
        return {"values": torch.tensor(values), "weights": torch.cat(weights)}


def gradient_and_autograds(unit: str) -> tuple[Tensor, Tensor]:
    """The gradient with which the reference steps, and autograd's of the objective, written out."""
    with tiny() as subject, pytest.MonkeyPatch.context() as patch:
        reference = reference_of(subject, {}, 1e-3)
        batch, passages = batch_of(subject.runtime, unit), subject.batch(5)
        weights_U = torch.linspace(0.2, 1.8, batch.units.count)
        expected = _autograds(reference, batch, weights_U, passages)
        seen: list[Tensor] = []
        upstream = dynamic_reference.step_if_finite

        def step(optimizer: Any) -> float:
            seen.extend(p.main_grad.flatten().clone() for p in reference.llm.parameters())
            return upstream(optimizer)

        patch.setattr(dynamic_reference, "step_if_finite", step)
        reference.learn(batch, weights_U, passages)
        return torch.cat(seen), expected


def _autograds(
    reference: DynamicReference, batch: Batch, weights_U: Tensor, passages: Batch
) -> Tensor:
    [model] = reference.llm.modules

    def losses(rows: Batch) -> Tensor:
        packed = None if rows.borders_BS is None else packed_pieces(pieces_of(rows.borders_BS))
        logits = model(rows.tokens_BS, rows.position_ids_BS, None, packed_seq_params=packed)
        found = F.cross_entropy(logits.flatten(0, 1), rows.labels_BS.flatten(), reduction="none")
        return found.view_as(rows.labels_BS) * rows.loss_mask_BS

    validation = losses(passages).sum() / passages.loss_mask_BS.sum()
    units, of_units = batch.units, losses(batch)
    sums_U = units.sum_of_rows(of_units)
    counts_U = units.sum_of_rows(batch.loss_mask_BS).clamp(min=1.0)
    sizes_U = torch.ones_like(sums_U) if units.sizes_U is None else units.sizes_U
    training = (sizes_U * weights_U * sums_U / counts_U).sum() / sizes_U.sum()
    parameters = list(reference.llm.parameters())
    gradients = torch.autograd.grad(validation + PENALTY * training, parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])
