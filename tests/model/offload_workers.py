"""What the ranks of the tests of off-loading run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dwm.model import LLM, forward_only
from megatron_dwm.model.offload import Offload
from megatron_dwm.model.passes.objective import unit
from tests.tiny import MICRO_BATCH, Tiny, tinies


def _tensors(subject: Tiny) -> dict[str, list[Tensor]]:
    """Every large tensor of the model and its optimizer, found apart from the code under test."""
    adams = [member.optimizer for member in subject.optimizer.chained_optimizers]
    states = [state for adam in adams for state in adam.state.values()]
    return {
        "weights": [weight.data for weight in subject.llm.parameters()],
        "gradients": [weight.main_grad for weight in subject.llm.parameters()],
        "moments": [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")],
        "mains": [
            main for adam in adams for group in adam.param_groups for main in group["params"]
        ],
    }


def _bytes(subject: Tiny) -> dict[str, int]:
    """Bytes on the device by kind."""
    return {
        kind: sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        for kind, tensors in _tensors(subject).items()
    }


def _losses(llm: LLM, subject: Tiny) -> Tensor:
    return forward_only(llm, unit(subject.batch(9), MICRO_BATCH)).unit_losses_n.clone()


def _values(subject: Tiny) -> list[Tensor]:
    """Copies of everything but the gradients, which are zero after they were away."""
    kinds = {name: kind for name, kind in _tensors(subject).items() if name != "gradients"}
    return [tensor.clone() for kind in kinds.values() for tensor in kind]


def uses(**layout: Any) -> None:
    """Steps and passes of a model that is off-loaded, against the same model that is not."""
    with tinies(2, **layout) as (stays, subject):
        stays.train(1)
        stays.train(1)
        expected, losses = _values(stays), _losses(stays.llm, stays)
        everything = _bytes(subject)
        assert all(count > 0 for count in everything.values())
        offload = Offload(subject.llm, subject.optimizer)
        nothing = dict.fromkeys(everything, 0)
        assert _bytes(subject) == nothing, "all of it is freed"
        with offload.reading():
            assert _bytes(subject)["weights"] == everything["weights"]
            assert _bytes(subject)["moments"] == _bytes(subject)["gradients"] == 0
            _losses(subject.llm, subject)
        with offload.learning():
            assert _bytes(subject) == everything
            subject.train(1)
        with offload.learning(), offload.reading():
            subject.train(1)
        assert _bytes(subject) == nothing
        with offload.reading():
            assert torch.equal(_losses(subject.llm, subject), losses)
        with offload.learning():
            found = _values(subject)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
