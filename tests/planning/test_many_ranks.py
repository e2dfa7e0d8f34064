"""Layouts of 8 and 16 processes send what the plan says: number and bytes of messages, not time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_dwm.model import resolve_shape
from megatron_dwm.planning.traffic import Traffic, traffic_of
from megatron_dwm.weighting import method_class
from tests.launch import run_ranks
from tests.planning.runs import configured
from tests.planning.test_measured import SETTINGS

SHARDED = {"sharded_optimizer": True, "precision": "bf16"}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    8: [
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "pipeline": 2, "sequence_parallel": True, **SHARDED},
        {"tensor": 2, "context": 2, "sequence_parallel": True},
        {"context": 2, "pipeline": 2, **SHARDED},
    ],
    16: [
        {"tensor": 4, "pipeline": 2, "query_groups": 4},
        {"tensor": 2, "pipeline": 4, "sequence_parallel": True, **SHARDED},
        {"tensor": 2, "pipeline": 2, "virtual_stages": 2, "batch": 16},
    ],
}
AHEAD = {"mode": "online", "update_on": "ahead", "probe_fraction": 0.5}
LIMIT_S = 120.0


def passages(settings: dict[str, Any]) -> int:
    """Half as many as a batch has samples, so that the validation pass sends less."""
    return settings["batch"] // 2


def planned(settings: dict[str, Any], world_size: int, **weighting: Any) -> dict[str, Traffic]:
    config = configured(
        model={
            "hidden_size": settings["hidden"],
            "num_layers": settings["layers"],
            "num_query_groups": settings["query_groups"],
            "ffn_hidden_size": settings["ffn"],
            "vocab_size": settings["vocab"],
            "precision": settings["precision"],
        },
        policy="dwm",
        weighting=weighting,
        length=settings["sequence"],
        batch=settings["batch"],
        micro_batch=settings["micro_batch"],
        tensor=settings["tensor"],
        context=settings["context"],
        pipeline=settings["pipeline"],
        virtual_stages=settings["virtual_stages"],
        sequence=settings["sequence_parallel"],
        sharded_optimizer=settings["sharded_optimizer"],
    )
    config = replace(config, validation=replace(config.validation, batch_size=passages(settings)))
    shape = resolve_shape(config.model)
    weighting = method_class(config).model_shape(config, shape)
    lines = traffic_of(config, shape, weighting, world_size, on_gpu=False)
    return {line.link: line for line in lines}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_messages_by_link(world_size: int) -> None:
    cases = [{**SETTINGS, **layout} for layout in LAYOUTS[world_size]]
    arguments = [
        {"what": "by_link", "options": {**settings, "passages": passages(settings)}}
        for settings in cases
    ]
    found = run_ranks("tests.planning.workers:measured", world_size, arguments, limit_s=LIMIT_S)
    for settings, ranks in zip(cases, found, strict=True):
        ahead = planned(settings, world_size, **AHEAD)
        for link, line in planned(settings, world_size).items():
            planned_of = {
                "step": (line.step_messages, line.step),
                "update": (line.update_messages, line.update),
                "ahead": (ahead[link].update_messages, ahead[link].update),
            }
            for moment, (messages, num_bytes) in planned_of.items():
                counted = [rank[moment].get(link, (0, 0)) for rank in ranks]
                busiest = max(counted)
                assert busiest[0] == messages, (settings, link, moment)
                # Sharded, Megatron-Core pads the buffers to a multiple of the ranks.
                most = max(each[1] for each in counted)
                assert most == pytest.approx(num_bytes, rel=0.01), (settings, link, moment)
