"""A tied embedding over several stages: its gradient is summed over the first and the last."""

from __future__ import annotations

import pytest

from megatron_dwm.model import resolve_shape
from megatron_dwm.planning.traffic import Traffic, traffic_of
from tests.planning.runs import MODEL, configured


def _pipeline_link(*, tied: bool, policy: str, pipeline: int, tensor: int) -> Traffic:
    model = {"tied_embeddings": tied, "num_layers": 4, "vocab_size": 4096}
    layout = {"pipeline": pipeline, "tensor": tensor, "batch": 8}
    config = configured(model=model, policy=policy, **layout)
    lines = traffic_of(config, resolve_shape(config.model), None, 4, on_gpu=False)
    return next(line for line in lines if line.link == "pipeline")


@pytest.mark.parametrize(("pipeline", "tensor"), [(2, 1), (2, 2)])
@pytest.mark.parametrize(("policy", "passes"), [("uniform", 0), ("dwm", 2)])
def test_its_gradient_is_one_message_a_pass(
    policy: str, passes: int, pipeline: int, tensor: int
) -> None:
    """In the step's pass; in an update on a fresh batch in that batch's and in the passages'."""
    layout = {"policy": policy, "pipeline": pipeline, "tensor": tensor}
    apart, tied = (_pipeline_link(tied=tied, **layout) for tied in (False, True))
    gradient = 4 * 4096 * MODEL["hidden_size"] // tensor
    assert tied.step - apart.step == gradient == tied.step_wire - apart.step_wire
    assert tied.step_messages - apart.step_messages == 1
    assert tied.update - apart.update == passes * gradient


def test_the_busiest_stage_is_counted() -> None:
    """Of four stages one between sends more hidden states, and an end the embedding's gradient."""
    apart, tied = (
        _pipeline_link(tied=tied, policy="uniform", pipeline=4, tensor=1) for tied in (False, True)
    )
    gradient = 4 * 4096 * MODEL["hidden_size"]
    assert tied.step == apart.step / 2 + gradient
    assert _pipeline_link(tied=True, policy="uniform", pipeline=1, tensor=2).step == 0
