"""Training under the engine's speed switches, as everything that a run would see of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dwm.bilevel.slots import collect_slots
from megatron_dwm.model import forward_only
from megatron_dwm.model.parameter_gather import gather_now
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.model.passes.predictions import predict
from megatron_dwm.training import UpdateResult, UpperLevel
from megatron_dwm.training.update import Ahead
from tests.subjects import with_dwm
from tests.tiny import MICRO_BATCH, Tiny, tiny

STEPS = 6


def trained(update_on: str = "none", estimator: str = "tangent_probe", **layout: Any) -> dict:
    """Trains with updates before, inside or in every second step, and looks at the model between.

    Returns losses, gradient norms, alignments, evaluations and the last parameters of this rank.
    """
    with tiny(steps=0, **layout) as subject:
        ours = with_dwm(subject, MICRO_BATCH)
        seen: dict[str, list[Tensor]] = {"loss": [], "grad_norm": [], "alignment": [], "eval": []}
        for number in range(STEPS):
            upper = _upper(subject, number, update_on, estimator)
            if update_on == "fresh" and upper is not None:
                _keep(seen, ours.update(subject.batch(50 + number), upper))
                upper = None
            taken = ours.taken(subject.batch(number), upper)
            seen["loss"].append(torch.tensor(taken.loss))
            seen["grad_norm"].append(torch.tensor(taken.grad_norm))
            _keep(seen, taken.update)
            if number % 3 == 1:
                seen["eval"] += _evaluated(subject)
        gather_now(subject.llm)
        mains = [slot.main.detach().flatten() for slot in collect_slots(subject.optimizer)]
        parameters = [p.detach().float().flatten() for p in subject.llm.parameters()]
        found = {name: torch.stack(values) for name, values in seen.items() if values}
        return {**found, "parameters": torch.cat(parameters), "mains": torch.cat(mains)}


def _upper(subject: Tiny, number: int, update_on: str, estimator: str) -> UpperLevel | None:
    if update_on == "none" or number % 2 == 0:
        return None
    return UpperLevel(
        passages=subject.batch(100 + number),
        estimator=estimator,
        measure_noise=number == 3,
        ahead=Ahead() if update_on == "ahead" else None,
    )


def _keep(seen: dict[str, list[Tensor]], update: UpdateResult | None) -> None:
    if update is not None:
        seen["alignment"].append(update.hypergradient.alignment_n.float())
        seen["loss"].append(torch.tensor(update.hypergradient.val_loss))


def _evaluated(subject: Tiny) -> list[Tensor]:
    batch = subject.batch(7)
    likelihood_BS = predict(subject.llm, batch, MICRO_BATCH).log_likelihood_BS
    losses_n = forward_only(subject.llm, unit(batch, MICRO_BATCH)).unit_losses_n
    return [likelihood_BS.sum(dim=1).clone(), losses_n.clone()]


def buckets(**layout: Any) -> list[int]:
    """Returns the number of bucket groups of every chunk of this rank."""
    with tiny(steps=0, **layout) as subject:
        return [len(chunk.bucket_groups) for chunk in subject.llm.chunks]


def buffer_types(**layout: Any) -> list[str]:
    """Returns the types of the gradient buffers of this rank."""
    with tiny(steps=0, **layout) as subject:
        chunks = subject.llm.chunks
        return [str(buffer.grad_data.dtype) for chunk in chunks for buffer in chunk.buffers]
