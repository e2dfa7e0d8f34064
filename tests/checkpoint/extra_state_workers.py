"""What the ranks of tests/checkpoint/test_extra_state.py run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.checkpoint.load import load_parameters
from megatron_dwm.checkpoint.names import LLM_FOLDER
from megatron_dwm.checkpoint.parts import sharded_model
from megatron_dwm.convert.written_model import save_tensors
from megatron_dwm.model.layers.local import RMSNorm
from tests.tiny import tiny


def loaded_into_norms_with_more_state(folder: str, **layout: Any) -> tuple[bool, set[int], int]:
    """Whether all parameters came back; the states that norms were given; the number of norms.

    The checkpoint is of norms without a state of their own. Those that load it have one, as
    Transformer Engine's norm (an operation with `get_extra_state`) has.
    """
    given: list[int] = []

    def set_extra_state(_: RMSNorm, state: Tensor) -> None:
        given.append(int(state))

    with tiny(qk_layernorm=True, **layout) as subject:
        if subject.runtime.is_main:
            (Path(folder) / LLM_FOLDER).mkdir(parents=True)
        subject.runtime.barrier()
        save_tensors(sharded_model(subject.llm), Path(folder) / LLM_FOLDER)
        before = [parameter.detach().clone() for parameter in subject.llm.parameters()]
        with torch.no_grad():
            for parameter in subject.llm.parameters():
                parameter.add_(1.0)
        RMSNorm.get_extra_state = lambda _: torch.tensor(7)  # type: ignore[method-assign]
        RMSNorm.set_extra_state = set_extra_state  # type: ignore[method-assign]
        try:
            load_parameters(subject.llm, Path(folder))
        finally:
            del RMSNorm.get_extra_state, RMSNorm.set_extra_state
        parameters = subject.llm.parameters()
        same = all(torch.equal(p, kept) for p, kept in zip(parameters, before, strict=True))
        norms = [m for module in subject.llm.modules for m in module.modules()]
        return same, set(given), sum(isinstance(m, RMSNorm) for m in norms) - len(given)
