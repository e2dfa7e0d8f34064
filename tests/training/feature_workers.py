"""What the ranks of the tests of weights from the LLM's features run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dwm.bilevel import ESTIMATORS, Problem
from megatron_dwm.bilevel.slots import collect_slots
from megatron_dwm.model import forward_only
from megatron_dwm.model.passes.objective import token_mean, unit
from megatron_dwm.training import UpperLevel
from megatron_dwm.training.weighted_pass import weighted_pass
from tests.documents import packed_batch
from tests.subjects import with_dwm
from tests.tiny import MICRO_BATCH, Tiny, tiny

TRAIN, VALIDATION, NEXT = 100, 101, 102


def steps_and_updates(
    group: str, update_on: str, micro_batch: int = MICRO_BATCH, **layout: Any
) -> dict[str, Tensor]:
    """A step with an update, then a step with what was learned: weights, losses, phi, theta."""
    with tiny(**layout) as subject:
        trained = with_dwm(subject, micro_batch, encoder="llm", group=group)
        upper = UpperLevel(passages=subject.batch(VALIDATION))
        if update_on == "fresh":
            update = trained.update(subject.batch(TRAIN), upper)
            first = trained.taken(subject.batch(TRAIN))
        else:
            first = trained.taken(subject.batch(TRAIN), upper)
            update = first.update
        second = trained.taken(subject.batch(NEXT))
        phi = [p.detach().flatten() for p in trained.method.trainer.model.parameters()]
        return {
            "first weights": trained.gather(first.units.weights_n),
            "alignments": trained.gather(update.hypergradient.alignment_n),
            "phi": torch.cat(phi),
            "second weights": trained.gather(second.units.weights_n),
            "losses": torch.tensor([first.loss, second.loss, update.train_loss]),
            "gradient norms": torch.tensor([first.grad_norm, second.grad_norm]),
        }


def features_and_by_hand(early_layer: int, **layout: Any) -> list[tuple[Tensor, Tensor]]:
    """Features and losses of a pass, and the same from the model's layers called one by one."""
    with tiny(layers=4, **layout) as subject, torch.no_grad():
        batch = subject.batch(TRAIN)
        result = forward_only(subject.llm, unit(batch, MICRO_BATCH), early_layer=early_layer)
        [model] = subject.llm.modules
        hidden = model.embedding(batch.tokens_BS, batch.position_ids_BS)
        rotary = model.rotary_pos_emb(batch.tokens_BS.shape[1])
        outputs = []
        for layer in model.decoder.layers:
            hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
            outputs.append(hidden.mean(dim=0))
        final = model.decoder.final_layernorm(hidden).mean(dim=0)
        features = result.features
        return [(features.early_nD, outputs[early_layer - 1]), (features.final_nD, final)]


def state_after_step(learns: bool, **layout: Any) -> tuple[list[Tensor], list[float]]:
    """The state after a step with or without a weighting update inside; and, where there was one,
    the L_val(theta') that it found and the validation loss at the parameters after the step.
    """
    with tiny(**layout) as subject:
        val = subject.batch(VALIDATION)
        trained = with_dwm(subject, MICRO_BATCH, encoder="llm", group="micro_batch")
        upper = UpperLevel(passages=val) if learns else None
        update = trained.taken(subject.batch(TRAIN), upper).update
        if update is None:
            return _state(subject), []
        after = forward_only(subject.llm, token_mean(val, MICRO_BATCH))
        loss_sum = trained.gather(after.loss_sums_n).double().sum()
        count = trained.gather(after.token_counts_n).double().sum()
        return _state(subject), [update.hypergradient.val_loss, float(loss_sum / count)]


def _state(subject: Tiny) -> list[Tensor]:
    """Parameters, main parameters, moments and step counters of this rank."""
    slots = collect_slots(subject.optimizer)
    state = [torch.as_tensor(value) for slot in slots for value in slot.state.values()]
    parameters = [*subject.llm.parameters(), *(slot.main for slot in slots)]
    return [tensor.detach().clone() for tensor in [*parameters, *state]]


def inside_and_separate(**layout: Any) -> tuple[Tensor, Tensor]:
    """Alignments found inside a step, and by a separate hypergradient at the state before it, which
    the tests of bilevel/ hold against double precision.
    """
    with tiny(**layout) as subject:
        trained = with_dwm(subject, MICRO_BATCH, encoder="llm", group="micro_batch")
        train = subject.batch(TRAIN)
        result = weighted_pass(
            trained.learner, trained.method, train, trained.state, for_update=False
        )
        problem = Problem(
            llm=subject.llm,
            optimizer=subject.optimizer,
            train_batch=subject.batch(TRAIN),
            weights_n=result.weights_n,
            val_batch=subject.batch(VALIDATION),
            micro_batch_size=MICRO_BATCH,
        )
        separate = ESTIMATORS["tangent_probe"](problem).alignment_n
        upper = UpperLevel(passages=subject.batch(VALIDATION))
        update = trained.taken(train, upper).update
        return update.hypergradient.alignment_n, separate


def agreement_of_halves(**layout: Any) -> tuple[float, float]:
    """The agreement that an update finds over documents; and by hand, of those that count."""
    with tiny(**layout) as subject:
        trained = with_dwm(subject, MICRO_BATCH, encoder="llm", group="micro_batch")
        options = {"border_loss": False, "uncounted": 0.2}
        batch = packed_batch(TRAIN, subject.runtime, **options)
        passages = packed_batch(VALIDATION, subject.runtime, **options)
        update = trained.update(batch, UpperLevel(passages=passages, measure_noise=True))
        halves = update.hypergradient.halves_2n
        values = [*halves, batch.units.sizes_U]
        first, second, sizes = (update.units.gather(each, subject.runtime) for each in values)
        counted = torch.stack([first, second])[:, sizes > 0].double()
        assert int((sizes == 0).sum()) > 3 and update.noise is not None
        return update.noise.agreement, float(torch.corrcoef(counted)[0, 1])
